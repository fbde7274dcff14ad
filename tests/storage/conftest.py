from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storage import servers
from tests.storage.servers import S3Server


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    with servers.moto() as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[S3Server]:
    with servers.seaweedfs() as server:
        yield server


@pytest.fixture
def s3(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The quick S3 server, and the environment that leads to it."""
    servers.set_environment(moto, monkeypatch)
    return moto
