"""A run whose `--run-dir` is a URL, on a real server: it is hurt, stopped, and continued elsewhere."""

from __future__ import annotations

import json
import re
import signal

import pytest

from ftrain.errors import ExitCode
from ftrain.storage import open_storage
from ftrain.storage.history import read_history
from tests.launching.harness import FTRAIN, Cluster, Launcher
from tests.recovery import training
from tests.recovery.account import STEPS, Job, committed
from tests.recovery.conftest import Reference
from tests.recovery.test_stopping import stop
from tests.storage.servers import Server


def launch(cluster: Cluster, job: Job, url: str, environment: dict[str, str], *more: object) -> Launcher:
    own = ("--nproc-per-node", 2, "--checkpoint-every", 5, "--run-dir", url)
    script = (training.__file__, "--out", job.out, "--parallel", "ddp", "--steps", STEPS)
    return cluster.launch(*own, *script, *more, environment=environment)


def test_a_hurt_and_stopped_run_goes_on_from_the_store_on_another_node_to_the_same_end_as_one_on_a_disk(
    cluster: Cluster, store: Server, unhurt: Reference
) -> None:
    job, url = Job(cluster.path / "job"), store.new_url()
    injury = json.dumps([{"point": "forward", "rank": 1, "step": 7, "how": "SIGKILL"}])
    first = launch(cluster, job, url, {training.INJURIES: injury}, "--pause", 0.3)
    committed(first, 8)  # after the injury
    done = stop(first, job, 10, signal.SIGTERM)
    assert first.process.returncode == ExitCode.PREEMPTED, first.text
    assert job.injuries() == 1
    storage = open_storage(url)
    commits = [body.attempt for _, body in read_history(storage)[0].commits]
    assert commits[-1].step == done
    assert len(storage.list("checkpoints")) == len(commits) <= 2

    here = next((cluster.path / "runs").iterdir())
    assert f"run in {url}; logs, events and the secret in {here}" in first.text
    assert {path.name for path in here.iterdir()} >= {"logs", "events.jsonl", "secret.pem"}
    assert not {path.name for path in here.iterdir()} & {"journal", "checkpoints"}
    here.rename(cluster.path / "of another node")

    second = launch(cluster, job, url, {}, "--pause", 0)
    assert second.wait() == 0, second.text
    assert done == next(step.number for step in job.steps() if step.generation == 3)
    assert job.end() == unhurt("ddp").end()
    assert job.samples() == unhurt("ddp").samples()


@pytest.mark.parametrize("store", ["moto", "azurite"], indirect=True)  # SeaweedFS makes buckets that are not there
def test_a_store_that_cannot_be_used_is_a_wrong_use_told_in_one_line(cluster: Cluster, store: Server) -> None:
    script = cluster.script("print('never')")
    url = f"{store.new_url().rpartition('/')[0].replace('bucket', 'no-such-bucket')}/run"
    launcher = cluster.launch("--run-dir", url, script)
    assert launcher.wait() == ExitCode.USAGE
    assert launcher.text.splitlines()[-1].startswith(f"ftrain: {url} cannot be used: cannot write {url}/")
    assert re.search(r"404 Not Found \((NoSuchBucket|ContainerNotFound): ", launcher.text)
    assert "Traceback" not in launcher.text
    assert "never" not in launcher.text.replace(str(script), "")


@pytest.mark.parametrize("store", ["moto"], indirect=True)
def test_status_finds_a_run_by_its_url(cluster: Cluster, store: Server) -> None:
    url = store.new_url()
    script = cluster.script(
        """
        import ftrain
        run = ftrain.join()
        for step in run.steps(2):
            with step:
                while not (run.run_dir / "go on").exists():
                    pass
        """
    )
    launcher = cluster.launch("--run-dir", url, script)
    launcher.says("generation 1: 1 node(s)")
    asked = cluster.start([*FTRAIN, "status", url, "--json"])
    assert asked.wait() == 0, asked.text
    assert json.loads(asked.text.splitlines()[-1])["generation"] == 1
    (next((cluster.path / "runs").iterdir()) / "go on").touch()
    assert launcher.wait() == 0, launcher.text
