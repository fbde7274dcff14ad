"""When commits are made, and what happens when they cannot be."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftrain.errors import ExitCode
from tests.launching.harness import Cluster, Launcher, wait_for
from tests.recovery import hasty_launcher
from tests.recovery.account import STEPS, Job, arguments, launch

DISK_BYTES = 4 << 20


def test_period_in_seconds_commits_while_the_run_goes_on_and_keeps_as_many_as_asked(cluster: Cluster) -> None:
    job = Job(cluster.path / "job")
    launcher = launch(cluster, job, every="1s", flags=("--keep", 3), steps=0, more=("--pause", 0.02))
    wait_for(lambda: launcher.text.count(" committed (") >= 5, "five commits")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait() == ExitCode.PREEMPTED, launcher.text
    assert len(job.commits()) >= 5
    assert [job.done_at(path) for path in job.checkpoints()] == job.commits()[-3:]


def test_best_commits_by_a_logged_metric_stay_over_a_restart(cluster: Cluster) -> None:
    job = Job(cluster.path / "job")
    flags = ("--keep", 1, "--keep-best", "1:loss", "--keep-best", "1:loss:max")
    for _ in range(2):
        before = len(job.commits()) if job.run_dir.exists() else 0
        launcher = launch(cluster, job, every=2, flags=flags, steps=0)
        wait_for(lambda before=before: len(job.commits()) >= before + 4, "more commits")  # type: ignore[misc]
        launcher.process.send_signal(signal.SIGTERM)
        assert launcher.wait() == ExitCode.PREEMPTED, launcher.text
    logged = {body["attempt"]["step"]: body["metrics"]["loss"] for body in job.journal("commit")}
    assert all(one["step"] == step - 1 for step, one in logged.items())
    values = {step: one["value"] for step, one in logged.items()}
    newest = max(values)
    kept = best_and_newest(values)
    before = best_and_newest({step: value for step, value in values.items() if step != newest})
    # What the very last commit made needless may be left for the next start to remove.
    assert kept <= {job.done_at(path) for path in job.checkpoints()} <= kept | before


def best_and_newest(losses: dict[int, float]) -> set[int]:
    """The steps of the smallest loss, of the largest, and the newest."""
    return {min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__), max(losses)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", str(path).encode(), b"tmpfs", 0, f"size={DISK_BYTES}".encode()) != 0:
        pytest.skip(f"no file system can be mounted here: {os.strerror(ctypes.get_errno())}")
    yield path
    libc.umount2(str(path).encode(), 2)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def test_full_disk_costs_commits_but_no_step_until_there_is_room_again(cluster: Cluster, small_disk: Path) -> None:
    job = Job(cluster.path / "job")
    job.path.mkdir()
    job.run_dir.symlink_to(small_disk)
    launcher = launch(cluster, job, every=5, steps=0)
    launcher.says(" committed (")
    ballast = small_disk / "ballast"
    fill(ballast)
    launcher.says(" given up: ")
    assert "No space left on device" in launcher.text
    ballast.unlink()
    commits_again_and_leaves(launcher, job)


def commits_again_and_leaves(launcher: Launcher, job: Job) -> None:
    """There is another commit, and no rank was lost before; on SIGTERM the last finished step is committed."""
    committed = launcher.text.count(" committed (")
    wait_for(lambda: launcher.text.count(" committed (") > committed, "the next commit")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait() == ExitCode.PREEMPTED, launcher.text
    assert job.commits()[-1] == job.done()
    assert "interrupted" not in launcher.text


def test_last_state_that_cannot_be_committed_ends_with_74_and_the_same_command_makes_it_good(cluster: Cluster) -> None:
    job = Job(cluster.path / "job")
    flags = ("--nproc-per-node", 2, "--checkpoint-every", 5)
    command = [sys.executable, hasty_launcher.__file__, "launch", *flags, *arguments(job, "ddp", STEPS, "--pause", 0.1)]
    launcher = cluster.start([*map(str, command)])
    launcher.says(" committed (")
    checkpoints, aside = job.run_dir / "checkpoints", job.run_dir / "aside"
    checkpoints.rename(aside)
    checkpoints.touch()  # whatever is to be written below it cannot be
    assert launcher.wait() == ExitCode.STORAGE, launcher.text
    assert job.done() == STEPS  # the training itself was well
    assert len(job.end()) == 2
    stands = job.commits()[-1]
    said = f"finished, but the last state, of step {STEPS}, could not be committed: "
    line = next(line for line in launcher.text.splitlines() if said in line)
    assert "Not a directory" in line
    assert line.endswith(f"; the commit of step {stands} stands")
    assert job.journal("finish")[-1]["exit_code"] == ExitCode.STORAGE
    assert cluster.nothing_left()

    checkpoints.unlink()
    aside.rename(checkpoints)
    launcher = launch(cluster, job, every=5)
    assert launcher.wait() == 0, launcher.text
    assert f"from step {stands}" in launcher.text
    assert job.commits()[-1] == STEPS
