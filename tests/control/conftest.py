"""A service, its owner, an agent that behaves, and the log, for the control plane's tests."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from control_parties import Agent, Log, Recorder

from ftrain.control.secret import Secret
from ftrain.control.service import Service
from ftrain.core import messages as m


@pytest.fixture(scope="session")
def secret() -> Secret:
    return Secret.create()


@pytest.fixture(scope="session")
def other_secret() -> Secret:
    return Secret.create()


@pytest.fixture
async def log() -> AsyncIterator[Log]:
    handler = Log()
    loggers = [logging.getLogger(name) for name in ("ftrain.control", "aiohttp", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture
def owner() -> Recorder:
    return Recorder()


@pytest.fixture
async def service(owner: Recorder, secret: Secret, log: Log) -> AsyncIterator[Service]:
    serving = Service(owner, secret)
    serving.port = await serving.start()  # type: ignore[attr-defined]
    yield serving
    await serving.close()


@pytest.fixture
def port(service: Service) -> int:
    return service.port  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
async def good(port: int, secret: Secret, owner: Recorder) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """An agent that behaves. Calling it makes one exchange in both directions, which must work."""
    agent = Agent(port, secret, "good")
    assert await agent.next_state() is None
    peer, _ = await owner.next("open", "good")
    count = 0

    async def exchange() -> None:
        nonlocal count
        count += 1
        assert agent.client.send(m.Heartbeat(sequence=count))
        while True:
            _, message = await owner.next("message", "good")
            if message == m.Heartbeat(sequence=count):
                break
        peer.send(m.Tell(text=str(count)))
        assert await agent.next_heard() == m.Tell(text=str(count))

    await exchange()
    yield exchange
    assert agent.hellos == 1, "the good agent lost its connection"
    await agent.stop()


@pytest.fixture
async def session(secret: Secret) -> AsyncIterator[aiohttp.ClientSession]:
    """A holder of the secret that can say what it likes."""
    connector = aiohttp.TCPConnector(ssl=secret.client_context(), force_close=True)
    async with aiohttp.ClientSession(connector=connector) as opened:
        yield opened


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections get half a second to come to the point: the same code, sooner."""
    monkeypatch.setattr("ftrain.control.door.OPENING_SECONDS", 0.5)
