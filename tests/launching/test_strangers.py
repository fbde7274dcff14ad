"""Who does not hold the secret, or talks nonsense, costs a running job a line in its log; nobody else reaches it."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress

import aiohttp
import psutil
import pytest

from ftrain.control.channel import FRAME_BYTES_LIMIT, encode
from ftrain.control.client import fetch_status
from ftrain.control.secret import Secret
from ftrain.core import messages as m
from ftrain.errors import Refused
from tests.launching.harness import Cluster, Launcher, wait_for
from tests.recovery.account import Job, launch
from tests.recovery.training import INJURIES

Attack = Callable[[int, Secret], Awaitable[None]]
PATIENCE_SECONDS = 120.0
STEPS = 60


async def says_garbage(port: int, secret: Secret) -> None:
    await _raw(port, b"\x00\xff" * 4096)


async def speaks_plain_http(port: int, secret: Secret) -> None:
    assert b"generation" not in await _raw(port, b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")


async def shows_no_secret(port: int, secret: Secret) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    assert await _raw(port, b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n", context) == b""


async def holds_another_secret(port: int, secret: Secret) -> None:
    with pytest.raises(Refused, match="does not hold this run's secret"):
        await fetch_status(f"127.0.0.1:{port}", Secret.create())


async def sends_nonsense(port: int, secret: Secret) -> None:
    await _member(port, secret, b'{"kind":"no such kind"}')


async def sends_what_does_not_parse(port: int, secret: Secret) -> None:
    await _member(port, secret, b"[[[[")


async def sends_too_much(port: int, secret: Secret) -> None:
    await _member(port, secret, b" " * (FRAME_BYTES_LIMIT + 1))


async def speaks_before_hello(port: int, secret: Secret) -> None:
    await _member(port, secret, encode(m.Notice("SIGTERM", 1.0)))


async def asks_for_what_is_not_there(port: int, secret: Secret) -> None:
    async with _session(secret) as session, session.get(f"https://127.0.0.1:{port}/journal") as response:
        assert response.status == 404


# Each with words of the line that it costs.
ATTACKS: list[tuple[Attack, str]] = [
    (says_garbage, "refused a connection from 127.0.0.1"),
    (speaks_plain_http, "HTTP without TLS"),
    (shows_no_secret, "showed no secret"),
    (holds_another_secret, "refused a connection from 127.0.0.1"),
    (sends_nonsense, "the agent at 127.0.0.1"),
    (sends_what_does_not_parse, "the agent at 127.0.0.1"),
    (sends_too_much, "the agent at 127.0.0.1"),
    (speaks_before_hello, "said Notice before Hello"),
    (asks_for_what_is_not_there, "there is no GET /journal here"),
]


def test_strangers_and_nonsense_cost_a_line_each_and_disturb_nothing(cluster: Cluster) -> None:
    unhurt, job = Job(cluster.path / "unhurt"), Job(cluster.path / "job")
    # However long the attacks take, they come in the middle.
    held = {"point": "step", "rank": 0, "step": STEPS - 2, "how": "wait for leave"}
    environment = {INJURIES: json.dumps([held])}
    launcher = launch(cluster, job, every=10, steps=STEPS, more=("--pause", 0.2), environment=environment)
    wait_for(lambda: job.done() > 0 or launcher.process.poll() is not None, "the first step")
    listening_on_loopback_only(cluster)
    port = json.loads((job.run_dir / "coordinator.json").read_text())["port"]
    secret = Secret.load(job.run_dir / "secret.pem")
    for attack, words in ATTACKS:
        before = lines(launcher)
        asyncio.run(attack(port, secret))
        wait_for(lambda before=before: len(lines(launcher)) > len(before), f"a line about {attack.__name__}")
        (line,) = lines(launcher)[len(before) :]
        assert words in line, attack.__name__
    assert asyncio.run(fetch_status(f"127.0.0.1:{port}", secret))["generation"] == 1
    assert job.done() < STEPS, "the attacks came too late to disturb anything"
    (job.path / "leave").touch()
    reference = launch(cluster, unhurt, every="off", steps=STEPS, more=("--pause", 0))
    assert (launcher.wait(), reference.wait()) == (0, 0), launcher.text
    assert "Traceback" not in launcher.text
    assert "interrupted" not in launcher.text
    assert job.history() == unhurt.history()
    assert job.end() == unhurt.end()


def listening_on_loopback_only(cluster: Cluster) -> None:
    """Agent, coordinator, store and process groups of a job on one node."""
    found = []
    for pid in cluster.processes():
        with suppress(psutil.NoSuchProcess):
            found += [one for one in psutil.Process(pid).net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert len(found) >= 2, "at least the coordinator and the store listen"
    assert {one.laddr.ip for one in found} <= {"127.0.0.1", "::1"}


def lines(launcher: Launcher) -> list[str]:
    """What the log says about strangers and nonsense so far."""
    marks = ("refused", "The agent at", "the agent at", "The message")
    return [line for line in launcher.text.splitlines() if any(mark in line for mark in marks)]


async def _raw(port: int, data: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """Say it, and return what is said until the other side hangs up."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        try:
            writer.write(data)
            if context is None:
                writer.write_eof()
            return await reader.read()
        except (ConnectionError, ssl.SSLError):
            return b""
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def _member(port: int, secret: Secret, data: bytes) -> None:
    """Connect as an agent does and send this as its first message; it must be hung up on."""
    url = f"https://127.0.0.1:{port}/agent"
    async with asyncio.timeout(PATIENCE_SECONDS), _session(secret) as session, session.ws_connect(url) as agent:
        with suppress(ConnectionError):
            await agent.send_str(data.decode())
        async for _ in agent:
            pass


def _session(secret: Secret) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=secret.client_context()))
