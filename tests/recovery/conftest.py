from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launching.harness import Cluster, clusters
from tests.recovery.account import Job, launch

Reference = Callable[[str], Job]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    yield from clusters(tmp_path)


@pytest.fixture(scope="session")
def unhurt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    """The run that nothing happened to, of DDP or FSDP2: two ranks, no checkpoints."""
    known: dict[str, Job] = {}

    def reference(parallel: str) -> Job:
        if parallel not in known:
            job = Job(cluster.path / parallel)
            launcher = launch(cluster, job, parallel, every="off", more=("--pause", 0))
            assert launcher.wait() == 0, launcher.text
            assert job.commits() == []
            assert not job.checkpoints()
            known[parallel] = job
        return known[parallel]

    for cluster in clusters(tmp_path_factory.mktemp("unhurt")):  # noqa: B007  # `reference` uses it
        yield reference
