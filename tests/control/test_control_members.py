"""Who holds the secret and breaks the protocol loses its own connection, with one line, and nothing else happens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
import msgspec
import pytest
from control_parties import PATIENCE_SECONDS, Log, Recorder, hello

from ftrain.core import messages as m

Exchange = Callable[[], Awaitable[None]]
HELLO = msgspec.json.encode(hello("bad")).decode()

BAD_TEXTS = {
    "malformed": '{"kind":"heartbeat"',
    "empty": "",
    "not an object": "[]",
    "trailing": '{"kind":"heartbeat","sequence":1} x',
    "deep array": "[" * 100_000,
    "deep object": '{"kind":"heartbeat","sequence":1,"report":' + '{"a":' * 50_000,
    "deep before the kind": '{"x":' + "[" * 5000 + "]" * 5000 + ',"kind":"heartbeat","sequence":1}',
    "unknown kind": '{"kind":"shutdown"}',
    "kind of the other side": '{"kind":"leave","term":1,"exit_code":0,"summary":""}',
    "no kind": '{"sequence":1}',
    "unknown field": '{"kind":"heartbeat","sequence":1,"extra":1}',
    "field that breaks lines": '{"kind":"heartbeat","sequence":1,"a\\nb\\u001b[31m":1}',
    "wrong type": '{"kind":"heartbeat","sequence":"1"}',
    "out of range": '{"kind":"heartbeat","sequence":-1}',
    "huge number": '{"kind":"heartbeat","sequence":' + "9" * 5000 + "}",
    "name too long": '{"kind":"goodbye","why":"' + "x" * 257 + '"}',
    "lone surrogate": '{"kind":"goodbye","why":"\\ud800"}',
}


async def _hung_up(socket: aiohttp.ClientWebSocketResponse) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await socket.receive()).type not in (
            aiohttp.WSMsgType.CLOSE,
            aiohttp.WSMsgType.CLOSED,
            aiohttp.WSMsgType.ERROR,
        ):
            pass


async def _one_line(log: Log, good: Exchange) -> str:
    await good()
    await log.wait_for(lambda lines: len(lines) >= 1)
    assert len(log.lines) == 1, log.lines
    assert log.tracebacks == 0
    assert log.lines[0].isprintable()
    assert "127.0.0.1:" in log.lines[0]
    return log.lines[0]


@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
async def test_bad_text_ends_its_connection_only(
    text: str, port: int, log: Log, owner: Recorder, session: aiohttp.ClientSession, good: Exchange
) -> None:
    async with session.ws_connect(f"https://127.0.0.1:{port}/agent", compress=0) as socket:
        await socket.send_str(HELLO)
        await owner.next("open", "bad")
        await owner.next("message", "bad")
        await socket.send_str(text)
        _, reason = await owner.next("close", "bad")
        await _hung_up(socket)
    assert (await _one_line(log, good)) == reason
    assert reason.startswith("node bad at 127.0.0.1:")


@pytest.mark.parametrize("first", ["", '{"kind":"heartbeat","sequence":1}', "{}"])
async def test_first_message_that_is_no_hello_ends_the_connection(
    first: str, port: int, log: Log, owner: Recorder, session: aiohttp.ClientSession, good: Exchange
) -> None:
    async with session.ws_connect(f"https://127.0.0.1:{port}/agent", compress=0) as socket:
        await socket.send_str(first)
        await _hung_up(socket)
    await _one_line(log, good)
    assert owner.events.empty()


@pytest.mark.usefixtures("impatient")
async def test_no_hello_in_time_ends_the_connection(
    port: int, log: Log, session: aiohttp.ClientSession, good: Exchange
) -> None:
    async with session.ws_connect(f"https://127.0.0.1:{port}/agent", compress=0) as socket:
        await _hung_up(socket)
    assert "did not say what it wants within 0.5 seconds" in await _one_line(log, good)


async def test_binary_frame_ends_its_connection_only(
    port: int, log: Log, session: aiohttp.ClientSession, good: Exchange
) -> None:
    async with session.ws_connect(f"https://127.0.0.1:{port}/agent", compress=0) as socket:
        await socket.send_bytes(HELLO.encode())
        await _hung_up(socket)
    assert "binary frame" in await _one_line(log, good)


async def test_text_that_is_not_utf8_ends_its_connection_only(
    port: int, log: Log, session: aiohttp.ClientSession, good: Exchange
) -> None:
    async with session.ws_connect(f"https://127.0.0.1:{port}/agent", compress=0) as socket:
        await socket.send_frame(b'{"kind":"\xff\xfe"}', aiohttp.WSMsgType.TEXT)
        await _hung_up(socket)
    await _one_line(log, good)


@pytest.mark.parametrize("nbytes", [m.MESSAGE_BYTES_MAX + 1, 8 * m.MESSAGE_BYTES_MAX])
async def test_oversized_message_ends_its_connection_only(
    nbytes: int, port: int, log: Log, owner: Recorder, session: aiohttp.ClientSession, good: Exchange
) -> None:
    async with session.ws_connect(f"https://127.0.0.1:{port}/agent", compress=0) as socket:
        await socket.send_str(HELLO)
        await owner.next("open", "bad")
        with pytest.raises((ConnectionError, aiohttp.ClientError)):  # noqa: PT012 (the cut may come at any of these)
            await socket.send_str("[" * nbytes)
            await _hung_up(socket)
            await socket.send_str("x")
        await owner.next("close", "bad")
    assert str(m.MESSAGE_BYTES_MAX + 1) in await _one_line(log, good)


async def test_broken_http_is_one_line(port: int, secret: object, log: Log, session: object, good: Exchange) -> None:
    context = secret.client_context()  # type: ignore[attr-defined]
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(b"GET /agent HTTP/1.1\r\nHost: x\r\nBad Header\x00: 1\r\n\r\n")
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert b" 400 " in await reader.read()
    writer.close()
    await _one_line(log, good)
