"""launch/slurm/train.sbatch with the real `ftrain` on a real Slurm of two nodes with two ranks each."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, wait_until

SCRIPT = Path(__file__).with_name("counting.py")
RANKS = range(4)
STEPS = 300


def submit(slurm: SlurmCluster, batch_script: Path, directory: Path) -> int:
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RUN_DIR": str(directory / "run"),
        "RANKS_PER_NODE": "2",
        "CHECKPOINT_EVERY": "50",
        "OMP_NUM_THREADS": "1",
    }
    return slurm.sbatch(
        "--cpus-per-task=2",
        f"--output={directory}/job.log",
        batch_script,
        *(SCRIPT, directory, str(STEPS), "0.1"),
        environment=environment,
    )


def numbers(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def batch_script(launch_directory: Path) -> Path:
    return launch_directory / "slurm" / "train.sbatch"


def test_preempted_run_loses_no_step_and_ends_as_if_nothing_had_been(
    slurm: SlurmCluster, batch_script: Path, tmp_path: Path
) -> None:
    def report() -> str:
        log = tmp_path / "job.log"
        return (log.read_text() if log.exists() else "no output") + slurm.logs()

    number = submit(slurm, batch_script, tmp_path)
    wait_until("some steps", lambda: len(numbers(tmp_path / "steps.3")) >= 10, report)
    urgent = slurm.sbatch("--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap=:")
    slurm.wait_for_job(urgent, "COMPLETED")
    wait_until("the job's end", lambda: slurm.job(number).state in ("COMPLETED", "FAILED"), report)
    job = slurm.job(number)
    assert (job.state, job.restarts) == ("COMPLETED", 1), report()
    assert "exit code 75, to be continued" in report()
    for rank in RANKS:
        first, second = numbers(tmp_path / f"starts.{rank}")
        assert first == 0
        assert 10 <= second < STEPS
        assert numbers(tmp_path / f"steps.{rank}") == list(range(STEPS)), (
            "each step exactly once, none lost, none repeated"
        )
        assert (tmp_path / f"total.{rank}").read_text() == f"{STEPS}.0\n"
