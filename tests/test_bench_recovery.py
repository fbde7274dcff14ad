"""bench/recovery.py counts what it says, names what it leaves out, and leaves no process behind."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))  # behind the standard library, which has a module `profile` too

from launchers import NotBackError, Recovery  # noqa: E402
from launchers.ftrain import Ftrain  # noqa: E402
from launchers.job import SETTLE_STEPS, Job  # noqa: E402
from launchers.torchft import Torchft  # noqa: E402
from recovery import Outcomes, comparisons  # noqa: E402

# A new process begins at step 0, as without a checkpoint.
RANK = """
import itertools, os, sys, time
with open(sys.argv[1], "a") as file:
    for step in itertools.count():
        file.write(f"{time.time():.4f} {step} {os.getpid()}\\n")
        file.flush()
        time.sleep(0.01)
"""
FOREVER = 'while :; do "$0" -c "$1" "$2"; done'


class Loops(Job):
    """A shell for each rank starts it again whenever it ends; `given_up` does not."""

    name = branch = "loops"
    given_up = False

    def commands(self) -> list[list[str]]:
        loop = '"$0" -c "$1" "$2"; exit 3' if self.given_up else FOREVER
        return [["sh", "-c", loop, sys.executable, RANK, str(self.path / f"rank-{rank}")] for rank in range(2)]


class GivenUp(Loops):
    given_up = True


def arguments() -> argparse.Namespace:
    model = {"parallel": "ddp", "layers": 1, "width": 64, "batch": 1, "length": 8}
    return argparse.Namespace(nodes=2, ranks=1, checkpoint_every=5, snapshot_every="1", hurt="kill", **model)


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[Loops]:
    job = Loops(tmp_path / "job", arguments())
    job.start()
    yield job
    job.stop()


def alive(pid: int) -> bool:
    """A zombie that nobody has buried yet is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_rank_is_back_when_every_rank_has_a_new_step(loops: Loops) -> None:
    recovery = loops.hurt_last_rank(phase=2)
    survivor, victim = ({line.pid for line in loops.lines(rank)} for rank in range(2))
    assert (len(survivor), len(victim)) == (1, 2)
    assert 0 < recovery.first_step_seconds < recovery.new_step_seconds
    assert recovery.redone_steps > SETTLE_STEPS
    assert recovery.step_seconds >= 0.01
    loops.stop()
    assert not any(map(alive, survivor | victim))


def test_a_launcher_that_gives_up_is_no_recovery(tmp_path: Path) -> None:
    job = GivenUp(tmp_path / "job", arguments())
    try:
        job.start()
        with pytest.raises(NotBackError, match="a launcher ended before a step beyond"):
            job.hurt_last_rank(phase=0)
    finally:
        job.stop()


def test_a_rehearsed_step_of_ftrain_counts_once(tmp_path: Path) -> None:
    (tmp_path / "rank-0").write_text("1.0 0 7\n2.0 0 7\n3.0 1 7\n4.0 2 7\n5.0 3")
    assert [(line.at, line.step) for line in Ftrain(tmp_path, arguments()).finished(0)] == [(2.0, 0), (3.0, 1)]


def test_steps_with_fewer_ranks_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "rank-0").write_text("10.0 4 7\n19.0 8 7\n")
    (tmp_path / "fewer-0").write_text("9.0 0 7\n13.5 5 7\n14.0 6 7\n")
    job = Torchft(tmp_path, arguments())
    assert [line.step for line in job.finished(0)] == [4, 8]
    assert job.stages(killed_at=12.0) == {"a new step on the fewer ranks left": 1.5}
    assert job.stages(killed_at=15.0) == {}


def test_kills_in_vain_count_as_the_time_that_was_waited() -> None:
    def back(seconds: float) -> Recovery:
        return Recovery(seconds, seconds, 0, 0.1, {})

    found = {"torchrun": Outcomes([back(8.0)], in_vain=2), "ftrain": Outcomes([back(1.0)])}
    left_out, counted = comparisons(found)
    assert "0.125 of torchrun's (1/8.0)" in left_out
    assert "Counted as 90 s: 0.011 (1/90.0) of torchrun's" in counted
    assert comparisons({"ftrain": Outcomes([back(1.0)])}) == []


def test_a_launcher_that_cannot_run_is_left_out_with_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "recovery.py"), "--launchers", "torchft", "--parallel", "fsdp", "--repeats", "0"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=tmp_path,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("torchft is left out: ")
    assert " UTC, " in second
