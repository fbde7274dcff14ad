"""Who does not hold the secret gets nothing, costs one line in the log, and disturbs nobody."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from control_parties import PATIENCE_SECONDS, Agent, Log

from ftrain.control import door
from ftrain.control.secret import Secret
from ftrain.errors import Refused

Exchange = Callable[[], Awaitable[None]]


async def _ended(reader: asyncio.StreamReader) -> bytes:
    """What the server says until it hangs up."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        try:
            return await reader.read()
        except (ConnectionError, ssl.SSLError):
            return b""


@pytest.fixture
async def one_line(log: Log, good: Exchange) -> AsyncIterator[None]:
    """After the test there is exactly one line in the log, without a traceback, and the good agent goes on."""
    yield
    await good()
    await log.wait_for(lambda lines: len(lines) >= 1)
    assert len(log.lines) == 1, log.lines
    assert log.tracebacks == 0
    assert "\n" not in log.lines[0]
    assert log.lines[0].startswith("refused a connection from 127.0.0.1:")


@pytest.mark.usefixtures("one_line")
async def test_plain_http_is_refused(port: int, log: Log) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"generation" not in await _ended(reader)
    writer.close()
    await log.wait_for(lambda lines: "HTTP without TLS" in "".join(lines))


@pytest.mark.usefixtures("one_line")
@pytest.mark.parametrize(
    "garbage", [b"\x00" * 4096, b"SSH-2.0-x\r\n" * 9, bytes(range(256)) * 64, b"\x16\x03\x01" * 99]
)
async def test_garbage_is_refused(port: int, garbage: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(garbage)
    writer.write_eof()
    await _ended(reader)
    writer.close()


@pytest.mark.usefixtures("one_line")
async def test_tls_without_a_certificate_is_refused(port: int, log: Log) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # The client's half of a TLS 1.3 handshake succeeds: it learns of the refusal when it reads.
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
    assert await _ended(reader) == b""
    writer.close()
    await log.wait_for(lambda lines: "showed no secret" in "".join(lines))


@pytest.mark.usefixtures("one_line")
async def test_tls_with_another_certificate_is_refused(
    port: int, secret: Secret, other_secret: Secret, log: Log
) -> None:
    context = other_secret.client_context()
    context.load_verify_locations(cadata=secret.certificate)  # it trusts the server, and is not trusted
    context.sslobject_class = ssl.SSLObject
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
    assert await _ended(reader) == b""
    writer.close()
    await log.wait_for(lambda lines: "showed another secret" in "".join(lines))


@pytest.mark.usefixtures("one_line")
async def test_tls_older_than_1_3_is_refused(port: int, secret: Secret) -> None:
    context = secret.client_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", port, ssl=context)


@pytest.mark.usefixtures("one_line")
async def test_agent_with_another_secret_is_refused_and_knows_it(port: int, other_secret: Secret) -> None:
    agent = Agent(port, other_secret)
    error = await agent.next_state()
    await agent.stop()
    assert isinstance(error, Refused)
    assert "does not hold this run's secret" in str(error)


@pytest.mark.usefixtures("impatient", "one_line")
async def test_silent_connection_is_cut(port: int, log: Log) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await _ended(reader)
    writer.close()
    await log.wait_for(lambda lines: "did not finish the TLS handshake" in "".join(lines))


@pytest.mark.usefixtures("impatient", "one_line")
async def test_connection_that_drips_is_cut(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    ended = asyncio.create_task(_ended(reader))
    for byte in b"\x16\x03\x01\x40\x00\x01" + b"\x00" * 4000:
        writer.write(bytes([byte]))
        if (await asyncio.wait((ended,), timeout=0.01))[0]:
            break
    await ended
    writer.close()


@pytest.mark.usefixtures("impatient", "one_line")
async def test_holder_of_the_secret_that_asks_nothing_is_cut(port: int, secret: Secret, log: Log) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=secret.client_context())
    assert await _ended(reader) == b""
    writer.close()
    await log.wait_for(lambda lines: "did not say what it wants" in "".join(lines))


async def test_flood_of_strangers_costs_a_line_a_second_and_stops_nobody(
    port: int, secret: Secret, log: Log, good: Exchange
) -> None:
    async def bad() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await _ended(reader)
        writer.close()

    flood = asyncio.gather(*(bad() for _ in range(200)))
    while not flood.done():
        await good()
        await asyncio.sleep(0)
    await flood
    latecomer = Agent(port, secret, "latecomer")
    assert await latecomer.next_state() is None
    await latecomer.stop()
    await log.wait_for(lambda lines: sum(_counted(line) for line in lines) == 200)
    assert len(log.lines) < 100  # however long it takes
    assert log.tracebacks == 0


def _counted(line: str) -> int:
    """How many refusals a line stands for."""
    assert line.startswith("refused a connection from 127.0.0.1:")
    return 1 + int(line.partition("(and ")[2].partition(" ")[0] or 0)


async def test_crowd_of_silent_connections_gives_way_to_an_agent(
    port: int, secret: Secret, good: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "OPENINGS_MAX", 16)
    monkeypatch.setattr(door, "CROWDED_SECONDS", 0.1)
    monkeypatch.setattr(door, "OPENING_SECONDS", 3600.0)
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(64)]
    try:
        agent = Agent(port, secret, "latecomer")
        while await agent.next_state() is not None:
            pass
        await good()
        await agent.stop()
    finally:
        for connection in silent:
            connection.close()
