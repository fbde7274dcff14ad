"""A run directory is enough to go on: with other ranks, with more steps, and past damaged commits."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ftrain.errors import ExitCode
from tests.launching.harness import Cluster, clusters, wait_for
from tests.recovery.account import STEPS, Job, launch
from tests.recovery.conftest import Reference
from tests.recovery.test_stopping import stop
from tests.recovery.training import SAMPLES, SAMPLES_PER_STEP

Stopped = Callable[[str, Path], Job]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stopped]:
    """Copies of a run of two ranks that was stopped by SIGTERM in the middle, with several commits."""
    known: dict[str, Job] = {}

    def copy(parallel: str, path: Path) -> Job:
        if parallel not in known:
            job = Job(cluster.path / parallel)
            launcher = launch(cluster, job, parallel, more=("--pause", 0.1))
            # Steps after a commit: with the one of the stop there are two.
            wait_for(lambda: job.commits() and job.done() > job.commits()[-1], "a commit, and a step after it")
            done = stop(launcher, job, 10, signal.SIGTERM)
            assert launcher.process.returncode == ExitCode.PREEMPTED, launcher.text
            assert job.commits()[-1] == done
            assert len(job.checkpoints()) == 2
            known[parallel] = job
        return known[parallel].copy(path)

    for cluster in clusters(tmp_path_factory.mktemp("stopped")):  # noqa: B007  # `copy` uses it
        yield copy


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_other_number_of_ranks_starts_from_the_same_bits_and_goes_on_in_the_data(
    cluster: Cluster, stopped: Stopped, unhurt: Reference, parallel: str, ranks: int
) -> None:
    job = stopped(parallel, cluster.path / "job")
    done = job.done()
    ended = {step.ended for step in job.steps() if step.number == done - 1}
    launcher = launch(cluster, job, parallel, ranks=ranks)
    assert launcher.wait() == 0, launcher.text
    first = [step for step in job.steps() if step.number == done]
    assert [step.rank for step in first] == list(range(ranks))
    assert {step.began for step in first} == ended
    assert job.samples() == unhurt(parallel).samples()
    steps_per_epoch = SAMPLES // SAMPLES_PER_STEP
    for epoch in range(STEPS // steps_per_epoch):
        of_epoch = job.samples()[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch]
        assert sorted(one for step in of_epoch for one in step) == list(range(SAMPLES))


def test_finished_run_goes_on_when_it_is_asked_for_more_steps(cluster: Cluster, unhurt: Reference) -> None:
    job = Job(cluster.path / "job")
    assert launch(cluster, job, steps=7).wait() == 0
    assert job.commits()[-1] == 7
    launcher = launch(cluster, job)
    assert launcher.wait() == 0, launcher.text
    assert "from step 7" in launcher.text
    assert job.end() == unhurt("ddp").end()
    assert job.commits()[-1] == STEPS


def damage(checkpoint: Path) -> None:
    """Turn one bit of the newest pack's payload."""
    data = checkpoint / "packs" / "00001" / "c" / "0"
    found = bytearray(data.read_bytes())
    found[0] ^= 1
    data.write_bytes(found)


@pytest.mark.parametrize("how", [damage, shutil.rmtree], ids=["damaged", "removed"])
def test_damaged_newest_commit_is_passed_over_for_the_one_before(
    cluster: Cluster, stopped: Stopped, unhurt: Reference, how: Callable[[Path], None]
) -> None:
    job = stopped("ddp", cluster.path / "job")
    before, newest = job.checkpoints()
    how(newest)
    launcher = launch(cluster, job)
    assert launcher.wait() == 0, launcher.text
    assert f"the commit of step {job.done_at(newest)} is damaged and is passed over" in launcher.text
    assert f"from step {job.done_at(before)}" in launcher.text
    assert job.history() == unhurt("ddp").history()
    assert job.end() == unhurt("ddp").end()


def test_run_whose_commits_are_all_damaged_ends_with_74_and_keeps_them(cluster: Cluster, stopped: Stopped) -> None:
    job = stopped("ddp", cluster.path / "job")
    kept = job.checkpoints()
    for checkpoint in kept:
        damage(checkpoint)
    launcher = launch(cluster, job)
    assert launcher.wait() == ExitCode.STORAGE, launcher.text
    assert "every commit of this run is damaged" in launcher.text
    assert "Traceback" not in launcher.text
    assert job.checkpoints() == kept
