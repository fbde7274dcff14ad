"""SIGTERM and Ctrl-C: the last finished step is committed, the exit code says so, and the same command goes on."""

from __future__ import annotations

import signal

import pytest

from ftrain.errors import ExitCode
from tests.launching.harness import Cluster, Launcher, wait_for
from tests.recovery.account import STEPS, Job, launch
from tests.recovery.conftest import Reference

IMPORTING = """
    import sys, time
    print("importing")
    if "slow" in sys.argv:
        time.sleep(600)
    import ftrain
    run = ftrain.join()
    for step in run.steps(2):
        with step:
            pass
"""


def stop(launcher: Launcher, job: Job, steps: int, number: signal.Signals) -> int:
    """Send the signal when so many steps are done. Returns how many were in the end."""
    wait_for(lambda: job.done() >= steps or launcher.process.poll() is not None, f"{steps} steps")
    launcher.process.send_signal(number)
    launcher.wait()
    done = job.done()
    assert job.done(rank=1) == done
    return done


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_stopped_run_goes_on_without_a_step_lost_or_done_twice(
    cluster: Cluster, unhurt: Reference, parallel: str
) -> None:
    job = Job(cluster.path / "job")
    stops = [(5, signal.SIGTERM, ExitCode.PREEMPTED), (11, signal.SIGINT, ExitCode.INTERRUPTED)]
    for steps, number, code in stops:
        launcher = launch(cluster, job, parallel, every="1h", more=("--pause", 0.1))
        done = stop(launcher, job, steps, number)
        assert launcher.process.returncode == code, launcher.text
        assert job.commits()[-1] == done, launcher.text
        assert cluster.nothing_left()
    launcher = launch(cluster, job, parallel, every="1h")
    assert launcher.wait() == 0, launcher.text
    reference = unhurt(parallel)
    assert job.end() == reference.end()
    assert sorted((step.number, step.rank) for step in job.steps()) == [
        (number, rank) for number in range(STEPS) for rank in (0, 1)
    ]
    assert job.history() == reference.history()


def test_sigterm_to_a_run_whose_first_step_does_not_end_in_time_leaves_with_75(cluster: Cluster) -> None:
    job = Job(cluster.path / "job")
    launcher = launch(cluster, job, flags=("--grace", "3s"), more=("--pause", 600))
    launcher.says("from the beginning")
    wait_for(lambda: job.status()["attempts"], "the loop: only then is something to be saved")
    launcher.process.send_signal(signal.SIGTERM)
    launcher.says("out of time: leaving without a commit of the last step")
    assert launcher.wait() == ExitCode.PREEMPTED, launcher.text
    assert "left on SIGTERM; no step was finished" in launcher.text
    assert cluster.nothing_left()


def test_sigterm_while_the_nursery_starts_leaves_with_75(cluster: Cluster) -> None:
    launcher = cluster.launch(cluster.script(IMPORTING))
    launcher.says("run directory")
    wait_for(lambda: any("agent.nursery" in command for command in cluster.processes().values()), "the nursery")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait() == ExitCode.PREEMPTED, launcher.text
    assert "generation 1" not in launcher.text
    assert cluster.nothing_left()


def test_sigterm_while_the_script_of_a_first_run_imports_leaves_with_75(cluster: Cluster) -> None:
    launcher = cluster.launch(cluster.script(IMPORTING), "slow")
    launcher.says("importing")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait() == ExitCode.PREEMPTED, launcher.text
    assert "left on SIGTERM; no step was finished" in launcher.text
    assert cluster.nothing_left()


def test_ctrl_c_before_the_first_commit_does_not_claim_one(cluster: Cluster) -> None:
    launcher = cluster.launch(cluster.script(IMPORTING), "slow")
    launcher.says("importing")
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.wait() == ExitCode.INTERRUPTED, launcher.text
    assert "interrupted; no step was finished" in launcher.text
    assert cluster.nothing_left()


def test_sigterm_while_the_script_of_a_run_with_commits_imports_leaves_with_75(cluster: Cluster) -> None:
    script = cluster.script(IMPORTING)
    assert cluster.launch("--run-dir", cluster.path / "run", script).wait() == 0
    launcher = cluster.launch("--run-dir", cluster.path / "run", script, "slow")
    launcher.says("importing")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait() == ExitCode.PREEMPTED, launcher.text
    assert cluster.nothing_left()
