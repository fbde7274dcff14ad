from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launching.harness import Cluster, clusters
from tests.recovery.account import Job, launch
from tests.storage.conftest import azurite, moto, seaweedfs, store

__all__ = ["azurite", "moto", "seaweedfs", "store"]

Reference = Callable[[str], Job]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    yield from clusters(tmp_path)


@pytest.fixture(scope="session")
def unhurt(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The run that nothing happened to, of DDP or FSDP2: two ranks, no checkpoints. All test processes have one."""
    own = tmp_path_factory.getbasetemp()
    everybodys = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "unhurt"
    everybodys.mkdir(exist_ok=True)

    def reference(parallel: str) -> Job:
        path = everybodys / parallel
        with (everybodys / f"{parallel}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back by closing
            if not (path / "is whole").exists():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
                _run_unhurt(path, parallel)
                (path / "is whole").touch()
        return Job(path / "job")

    return reference


def _run_unhurt(path: Path, parallel: str) -> None:
    for cluster in clusters(path):
        job = Job(path / "job")
        launcher = launch(cluster, job, parallel, every="off", more=("--pause", 0))
        assert launcher.wait() == 0, launcher.text
        assert job.commits() == []
        assert not job.checkpoints()
