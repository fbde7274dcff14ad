from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launching.harness import Cluster, clusters


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    yield from clusters(tmp_path)
