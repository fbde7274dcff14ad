"""Runs whose checkpoints are spread over several disks: real file systems on loop devices where they may be made."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ftrain
from tests.checkpoint.test_zarr_view import read_elsewhere, sha256
from tests.launching.harness import FTRAIN, Cluster, Launcher, free_port, wait_for
from tests.recovery.account import STEPS, Job, arguments, launch
from tests.recovery.conftest import Reference
from tests.recovery.test_saving import commits_again_and_leaves, fill
from tests.tools.runs import ckpt

DISK_BYTES = 16 << 20
FLAGS = ("--keep", 3)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[list[Path]]:
    """Two small ext4 file systems, each on a device of its own."""
    made: list[Path] = []
    with contextlib.ExitStack() as stack:
        for name in ("nvme1", "nvme2"):
            image, path = tmp_path / f"{name}.img", tmp_path / name
            path.mkdir()
            with image.open("wb") as file:
                file.truncate(DISK_BYTES)
            for command in (["mkfs.ext4", "-q", "-F", image], ["mount", "-o", "loop", image, path]):
                try:
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                except FileNotFoundError as error:
                    pytest.skip(f"no small file system can be made here: {error}")
                if done.returncode:
                    pytest.skip(f"no small file system can be made here: {done.stderr.strip()}")
            stack.callback(subprocess.run, ["umount", "--lazy", path], check=True)
            made.append(path)
        yield made


def spread(*disks: Path) -> tuple[object, ...]:
    return (*FLAGS, "--disks", ",".join(map(str, disks)))


def attempts(root: Path) -> list[str]:
    """Of each checkpoint below the directory, its path there."""
    return sorted(str(path.relative_to(root)) for path in root.glob("checkpoints/step-*/g*"))


def kill_after(launcher: Launcher, job: Job, commits: int) -> None:
    wait_for(lambda: len(job.commits()) >= commits, "more commits")
    launcher.process.kill()
    launcher.wait()


def test_run_on_several_disks_is_killed_and_goes_on_with_others_and_all_tools_follow(
    cluster: Cluster, disks: list[Path], unhurt: Reference
) -> None:
    job = Job(cluster.path / "job")
    first, second = disks
    launcher = launch(cluster, job, flags=spread(first), more=("--pause", 0.1))
    kill_after(launcher, job, 2)
    assert cluster.nothing_left()
    for step in job.commits():
        for path in job.run_dir.glob(f"checkpoints/step-{step:012d}/*/packs"):
            own, other = path / "00000" / "c" / "0", path / "00001" / "c" / "0"
            assert own.is_file() and not own.is_symlink()
            assert other.readlink() == first / other.relative_to(job.run_dir)
            assert other.readlink().is_file()

    launcher = launch(cluster, job, flags=spread(second))
    assert launcher.wait() == 0, launcher.text
    assert "from step" in launcher.text
    assert job.history() == unhurt("ddp").history()
    assert job.end() == unhurt("ddp").end()
    # What the very last commit made needless may be left for the next start to remove.
    kept = attempts(job.run_dir)
    assert 3 <= len(kept) <= 4 and set(attempts(second)) <= set(kept)
    assert set(attempts(first)) <= set(kept), "what the rules retired is still on the first disk"
    assert job.checkpoints()[-1].relative_to(job.run_dir).as_posix() in attempts(second)

    newest = job.checkpoints()[-1]
    for reference in (job.run_dir, newest):
        assert ckpt("verify", reference).code == 0, ckpt("verify", reference).text
    assert ckpt("ls", job.run_dir).code == 0
    assert ckpt("export", job.run_dir, cluster.path / "whole", "--to", "dcp", "--all").code == 0
    assert ckpt("diff", f"{job.run_dir}@-1", cluster.path / "whole").code == 0
    found = read_elsewhere(newest)
    assert "packs/00001/c/0" in (newest / "refs.json").read_text()
    names = [name for name, one in found.items() if name.startswith("model.") and one.get("type") == "float32"]
    model = {name.removeprefix("model."): torch.empty(found[name]["shape"]) for name in names}
    assert model
    for path in (job.run_dir, newest):
        ftrain.load(path, {"model": model}, strict=False, only=[f"model.{name}" for name in model])
        assert {name: sha256(tensor) for name, tensor in model.items()} == {
            name: found[f"model.{name}"]["sha256"] for name in model
        }
    forked = cluster.path / "forked"
    assert ckpt("fork", job.run_dir, forked).code == 0
    assert ckpt("verify", forked).code == 0
    assert ckpt("prune", job.run_dir, "--keep", 1).code == 0
    assert attempts(second) == attempts(job.run_dir) == [newest.relative_to(job.run_dir).as_posix()]
    assert attempts(first) == []


@pytest.fixture(params=["full", "gone"])
def hurt(request: pytest.FixtureRequest) -> Callable[[Path], tuple[str, Callable[[], object]]]:
    """Hurt a disk; what is said of it, and how it is mended."""

    def full(disk: Path) -> tuple[str, Callable[[], object]]:
        ballast = disk / "ballast"
        fill(ballast)
        return f"disk full: cannot write .* bytes to {disk}/", ballast.unlink

    def gone(disk: Path) -> tuple[str, Callable[[], object]]:
        own = disk / "run"
        away = own.rename(disk / "away")
        return f"{own}, a disk of this run, is gone", lambda: away.rename(own)

    return {"full": full, "gone": gone}[request.param]


def test_disk_that_is_full_or_gone_costs_commits_but_no_step_until_it_is_back(
    cluster: Cluster, disks: list[Path], hurt: Callable[[Path], tuple[str, Callable[[], object]]]
) -> None:
    job = Job(cluster.path / "job")
    launcher = launch(cluster, job, every=5, flags=spread(disks[0] / "run"), steps=0)
    launcher.says(" committed (")
    said, mend = hurt(disks[0])
    launcher.says(" given up: ")
    wait_for(lambda: matches(launcher, f"given up: .*{said}"), said)
    done = job.done()
    wait_for(lambda: job.done() > done + 3, "more steps")
    mend()
    commits_again_and_leaves(launcher, job)
    assert ckpt("verify", job.run_dir).code == 0
    assert launch(cluster, job, flags=FLAGS, steps=job.done()).wait() == 0  # what was given up is swept
    assert set(attempts(disks[0] / "run")) <= set(attempts(job.run_dir))


def matches(launcher: Launcher, pattern: str) -> bool:
    return re.search(pattern, launcher.text) is not None


def test_commit_whose_disk_is_gone_is_passed_over_for_one_that_is_whole(cluster: Cluster, unhurt: Reference) -> None:
    job, disk = Job(cluster.path / "job"), cluster.path / "disk"
    launcher = launch(cluster, job, flags=("--keep", 9), more=("--pause", 0.1))
    kill_after(launcher, job, 2)
    whole = job.commits()[-1]
    launcher = launch(cluster, job, flags=("--keep", 9, "--disks", disk), more=("--pause", 0.1))
    wait_for(lambda: attempts(disk), "a pack on the disk")
    kill_after(launcher, job, len(job.commits()) + 1)
    lost = job.commits()[-1]
    shutil.rmtree(disk)
    launcher = launch(cluster, job, flags=("--keep", 9))
    assert launcher.wait() == 0, launcher.text
    assert f"the commit of step {lost} is damaged and is passed over" in launcher.text
    assert f"packs/00001/c/0: {disk}, a disk of this run, is gone" in launcher.text
    assert f"from step {whole}" in launcher.text
    assert job.end() == unhurt("ddp").end()
    assert job.commits()[-1] == STEPS


def test_disks_of_some_nodes_are_found_by_a_coordinator_that_was_told_of_none(cluster: Cluster) -> None:
    job, disk = Job(cluster.path / "job"), cluster.path / "disk"
    secret = cluster.path / "secret.pem"
    assert cluster.start([*FTRAIN, "secret", str(secret)]).wait() == 0
    shared = ("--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--nnodes", 2, "--secret", secret)
    own = ("--run-dir", job.run_dir, "--checkpoint-every", 3, "--keep", 1)
    coordinator = cluster.start([*FTRAIN, "coordinator", *map(str, (*shared, *own))])
    coordinator.says("serving run")
    nodes = [
        cluster.launch(*shared, "--node-rank", rank, *more, *arguments(job, "ddp", STEPS))
        for rank, more in enumerate([(), ("--disks", disk)])
    ]
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text + nodes[1].text
    assert coordinator.wait() == 0, coordinator.text
    assert job.commits()[-1] == STEPS and len(job.commits()) >= 2  # a busy machine skips some
    assert attempts(disk) == attempts(job.run_dir) and len(attempts(disk)) <= 2
