"""launch/slurm/train.sbatch on a real Slurm of two nodes, with a stand-in for `ftrain` that shows what it was given."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, wait_until

STAND_IN = Path(__file__).with_name("stand_in_ftrain.sh")

Submit = Callable[..., int]


@pytest.fixture
def submit(slurm: SlurmCluster, launch_directory: Path, tmp_path: Path) -> Submit:
    """Give a function that submits the batch script; its run directory is tmp_path/run, its log tmp_path/job.log."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ftrain").symlink_to(STAND_IN)

    def submit(*arguments: str, options: tuple[str, ...] = (), **variables: str) -> int:
        environment = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "RUN_DIR": str(tmp_path / "run"),
            "RANKS_PER_NODE": "3",
            "CHECKPOINT_EVERY": "5",
            **variables,
        }
        return slurm.sbatch(
            "--cpus-per-task=2",
            *options,
            f"--output={tmp_path}/job.log",
            launch_directory / "slurm" / "train.sbatch",
            *arguments,
            environment=environment,
        )

    return submit


def arguments_of(run: Path, node: int, start: int = 0) -> list[str]:
    return (run / f"node{node}.start{start}" / "arguments").read_text().split("\0")[:-1]


def wait_for_both(slurm: SlurmCluster, run: Path, name: str) -> None:
    wait_until(name, lambda: all((run / f"node{node}.start0" / name).exists() for node in (0, 1)), slurm.logs)


def test_job_on_two_nodes_starts_one_launcher_on_each_and_completes(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path
) -> None:
    number = submit("train.py", "--name", "two words", "")
    slurm.wait_for_job(number, "COMPLETED")
    run = tmp_path / "run"
    for node in (0, 1):
        assert arguments_of(run, node) == [
            *("launch", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "3"),
            *("--rdzv-endpoint", f"127.0.0.1:{20000 + number % 12000}"),
            *("--secret", f"{run}/secret", "--run-dir", str(run), "--checkpoint-every", "5"),
            *("--grace", "200s"),
            *("train.py", "--name", "two words", ""),
        ]


def test_secret_is_made_once_and_kept_when_a_run_is_continued(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path
) -> None:
    slurm.wait_for_job(submit("train.py"), "COMPLETED")
    slurm.wait_for_job(submit("train.py"), "COMPLETED")
    secret = tmp_path / "run" / "secret"
    assert len(secret.read_text().splitlines()) == 1
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert arguments_of(tmp_path / "run", node=1, start=1)


def test_preempted_job_saves_is_requeued_and_completes(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    number = submit("stay.py")
    wait_for_both(slurm, run, "ready")
    urgent = slurm.sbatch("--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap=:")
    wait_for_both(slurm, run, "saved")
    slurm.wait_for_job(urgent, "COMPLETED")
    assert slurm.wait_for_job(number, "COMPLETED").restarts == 1
    assert (run / "node0.start1" / "ended").exists()
    assert (run / "node1.start1" / "ended").exists()
    log = (tmp_path / "job.log").read_text()
    assert "exit code 75, to be continued" in log
    assert "start 1, 2 nodes" in log
    assert "start 2, 2 nodes" in log


def test_job_near_its_time_limit_is_requeued_and_completes(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    number = submit("stay.py", options=("--time=1", "--signal=URG@40"))
    assert slurm.wait_for_job(number, "COMPLETED").restarts == 1
    assert "exit code 75, to be continued" in (tmp_path / "job.log").read_text()


def test_job_that_was_requeued_too_often_ends_with_exit_code_75(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path
) -> None:
    number = submit("stay.py", REQUEUES_MAX="0")
    wait_for_both(slurm, tmp_path / "run", "ready")
    slurm.command("scancel", "--signal=URG", str(number))
    job = slurm.wait_for_job(number, "FAILED")
    assert (job.exit_code, job.restarts) == (75, 0)
    assert "continue it by hand" in (tmp_path / "job.log").read_text()


def test_cancelled_job_saves_and_is_not_requeued(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    number = submit("stay.py")
    wait_for_both(slurm, tmp_path / "run", "ready")
    slurm.command("scancel", str(number))
    wait_for_both(slurm, tmp_path / "run", "saved")
    assert slurm.wait_for_job(number, "CANCELLED").restarts == 0


def test_killed_launcher_is_started_again_on_its_node(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    number = submit("killed.py")
    assert slurm.wait_for_job(number, "COMPLETED").restarts == 0
    run = tmp_path / "run"
    assert arguments_of(run, node=1, start=1) == arguments_of(run, node=1, start=0)
    assert not (run / "node0.start1").exists()


def test_launcher_that_is_told_to_leave_before_it_has_begun_is_requeued(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path
) -> None:
    number = submit("begin.py")
    wait_for_both(slurm, tmp_path / "run", "ready")
    slurm.command("scancel", "--signal=TERM", str(number))
    assert slurm.wait_for_job(number, "COMPLETED").restarts == 1


def test_failed_script_fails_the_job_with_its_exit_code(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    number = submit("fail.py")
    job = slurm.wait_for_job(number, "FAILED")
    assert (job.exit_code, job.restarts) == (1, 0)


def test_job_without_a_script_says_how_to_use_it(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    number = submit()
    assert slurm.wait_for_job(number, "FAILED").exit_code == 2
    assert "which script?" in (tmp_path / "job.log").read_text()


def test_batch_script_is_valid_bash(launch_directory: Path) -> None:
    script = launch_directory / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    on_each_node = script.read_text().split("node='\n")[1].split("'\n")[0]
    assert "ftrain launch" in on_each_node
    subprocess.run(["bash", "-n", "-c", on_each_node], check=True)
