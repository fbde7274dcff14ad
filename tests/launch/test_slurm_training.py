"""launch/slurm/train.sbatch with the real `ftrain` on a real Slurm of two nodes with two ranks each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, wait_until

SCRIPT = Path(__file__).with_name("counting.py")
RANKS = range(4)
STEPS = 600
Submit = Callable[..., int]


@pytest.fixture
def submit(slurm: SlurmCluster, launch_directory: Path, tmp_path: Path) -> Submit:
    """Give a function that submits the batch script with counting.py; both write below tmp_path."""

    def submit(loaders: int) -> int:
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RUN_DIR": str(tmp_path / "run"),
            "RANKS_PER_NODE": "2",
            "CHECKPOINT_EVERY": "200",
            "GRACE": "30s",
            "OMP_NUM_THREADS": "1",
        }
        return slurm.sbatch(
            *("--cpus-per-task=2", f"--output={tmp_path}/job.log"),
            launch_directory / "slurm" / "train.sbatch",
            *(SCRIPT, tmp_path, str(STEPS), "0.1", str(loaders)),
            environment=environment,
        )

    return submit


def numbers(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def log_of(directory: Path) -> str:
    log = directory / "job.log"
    return log.read_text() if log.exists() else "no output yet"


def wait_for_steps(directory: Path) -> None:
    wait_until("some steps", lambda: len(numbers(directory / "steps.3")) >= 10, lambda: log_of(directory))


def assert_continued_exactly(slurm: SlurmCluster, number: int, directory: Path) -> None:
    """The job was requeued once, and each rank did every step once over its two starts."""
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    wait_until("the job's end", lambda: slurm.job(number).state in ends, lambda: log_of(directory))
    job = slurm.job(number)
    assert (job.state, job.restarts) == ("COMPLETED", 1), log_of(directory)
    assert "exit code 75, to be continued" in log_of(directory), log_of(directory)
    for rank in RANKS:
        first, second = numbers(directory / f"starts.{rank}")
        assert first == 0
        assert 10 <= second < STEPS
        assert numbers(directory / f"steps.{rank}") == list(range(STEPS))
        assert (directory / f"total.{rank}").read_text() == f"{STEPS}.0\n"


def test_preempted_run_continues_exactly(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    number = submit(loaders=0)
    wait_for_steps(tmp_path)
    urgent = slurm.sbatch("--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap=:")
    slurm.wait_for_job(urgent, "COMPLETED")
    assert_continued_exactly(slurm, number, tmp_path)


def test_run_with_data_loaders_continues_exactly_after_the_signal_that_precedes_the_time_limit(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path
) -> None:
    number = submit(loaders=1)
    wait_for_steps(tmp_path)
    slurm.command("scancel", "--signal=URG", str(number))
    assert_continued_exactly(slurm, number, tmp_path)
