from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storage import servers
from tests.storage.gcs_front import gcs_front
from tests.storage.servers import AzureServer, GcsServer, S3Server, Server


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    with servers.moto() as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[S3Server]:
    with servers.seaweedfs() as server:
        yield server


@pytest.fixture(scope="session")
def azurite() -> Iterator[AzureServer]:
    with servers.azurite() as server:
        yield server


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[GcsServer]:
    with servers.gcs_emulator() as server:
        yield server


@pytest.fixture(scope="session")
def gcs(moto: S3Server) -> Iterator[GcsServer]:
    """What ftrain sees of GCS, before moto."""
    with gcs_front(moto) as server:
        yield server


@pytest.fixture
def s3(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The quick S3 server, and the environment that leads to it."""
    servers.set_environment(moto, monkeypatch)
    return moto


@pytest.fixture(params=["moto", "seaweedfs", "azurite"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server of each kind, and the environment that leads to it."""
    server: Server = request.getfixturevalue(request.param)
    servers.set_environment(server, monkeypatch)
    return server
