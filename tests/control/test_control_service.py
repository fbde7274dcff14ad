"""What a coordinator serves to those who hold the secret."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import psutil
import pytest
from control_parties import PATIENCE_SECONDS, Agent, Log, Recorder, hello

from ftrain.control import door
from ftrain.control.client import fetch_status
from ftrain.control.secret import Secret
from ftrain.control.service import EVERYWHERE, Service
from ftrain.core import messages as m
from ftrain.errors import ExitCode, Unavailable

AGENT_PROGRAM = """
import asyncio, sys
from pathlib import Path
from ftrain.control.client import Client
from ftrain.control.secret import Secret
from ftrain.core.messages import Hello

hello = Hello("process", -1, 1, "127.0.0.1", "here", 1, "r", "0", "0", 0)
client = Client(sys.argv[1], Secret.load(Path(sys.argv[2])))
asyncio.run(client.run(lambda: hello, print, lambda error: None))
"""


async def test_agent_with_the_secret_exchanges_messages_in_order(port: int, secret: Secret, owner: Recorder) -> None:
    agent = Agent(port, secret)
    assert await agent.next_state() is None
    peer, opened = await owner.next("open")
    assert opened == hello(term_seen=1)
    assert (await owner.next("message"))[1] == opened
    for i in range(300):
        assert agent.client.send(m.Heartbeat(sequence=i))
        peer.send(m.Tell(text=str(i)))
    for i in range(300):
        assert (await owner.next("message"))[1] == m.Heartbeat(sequence=i)
        assert await agent.next_heard() == m.Tell(text=str(i))
    await agent.stop()
    assert (await owner.next("close"))[0] is peer


async def test_messages_up_to_the_bound_pass_both_ways(port: int, secret: Secret, owner: Recorder) -> None:
    agent = Agent(port, secret)
    peer, _ = await owner.next("open")
    await owner.next("message")
    exits = tuple(
        m.RankExit(i, i, 1, 1, error=m.ErrorReport("E", "e" * 60000, "t" * m.TRACEBACK_CHARS_MAX)) for i in range(33)
    )
    large = m.Changed(m.Report(exits=exits))
    assert agent.client.send(large)
    assert (await owner.next("message"))[1] == large
    tell = m.Tell(text="\x01" * m.TRACEBACK_CHARS_MAX)
    peer.send(tell)
    assert await agent.next_heard() == tell
    await agent.stop()


async def test_messages_queued_before_the_close_arrive(port: int, secret: Secret, owner: Recorder) -> None:
    agent = Agent(port, secret)
    peer, _ = await owner.next("open")
    for i in range(100):
        peer.send(m.Tell(text=str(i)))
    peer.close("the run is over")
    for i in range(100):
        assert await agent.next_heard() == m.Tell(text=str(i))
    assert await owner.next("close") == (peer, "the run is over")
    peer.send(m.Tell(text="too late"))
    await agent.stop()


async def test_messages_queued_before_the_stop_arrive(port: int, secret: Secret, owner: Recorder) -> None:
    agent = Agent(port, secret)
    assert await agent.next_state() is None
    agent.client.send(m.Goodbye(why="done"))
    await agent.stop()
    await owner.next("open")
    await owner.next("message")
    assert (await owner.next("message"))[1] == m.Goodbye(why="done")
    await owner.next("close")


async def test_status_and_metrics_are_served_on_the_same_port(
    port: int, secret: Secret, session: aiohttp.ClientSession
) -> None:
    assert await fetch_status(f"127.0.0.1:{port}", secret) == {"run_id": "r", "generation": 3}
    async with session.get(f"https://127.0.0.1:{port}/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert await answer.text() == "ftrain_generation 3\n"


async def test_unknown_path_is_not_found(port: int, log: Log, session: aiohttp.ClientSession) -> None:
    async with session.get(f"https://127.0.0.1:{port}/etc/passwd") as answer:
        assert answer.status == 404
    async with session.get(f"https://127.0.0.1:{port}/agent") as answer:
        assert answer.status == 426
    await log.wait_for(lambda lines: len(lines) >= 2)


async def test_single_node_service_listens_on_loopback_only(service: Service, port: int) -> None:
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert (("127.0.0.1", port)) in [tuple(name) for name in listening]
    assert {name.ip for name in listening if name.port == port} == {"127.0.0.1"}


async def test_service_for_many_nodes_listens_everywhere(owner: Recorder, secret: Secret) -> None:
    everywhere = Service(owner, secret, EVERYWHERE)
    port = await everywhere.start()
    assert await fetch_status(f"127.0.0.1:{port}", secret)
    await everywhere.close()


async def test_taken_port_is_one_sentence_and_exit_code_69(port: int, secret: Secret, owner: Recorder) -> None:
    with pytest.raises(
        Unavailable, match=rf"^Cannot listen on 127.0.0.1 port {port}: another process has it\."
    ) as caught:
        await Service(owner, secret, port=port).start()
    assert caught.value.exit_code == ExitCode.UNAVAILABLE


@pytest.mark.parametrize("host", ["203.0.113.9", "no-such-host.invalid"])
async def test_foreign_address_is_one_sentence(host: str, secret: Secret, owner: Recorder) -> None:
    with pytest.raises(Unavailable, match=rf"^Cannot listen on {host}"):
        await Service(owner, secret, [host]).start()


async def test_closed_service_leaves_no_socket_and_tells_its_owner(
    port: int, secret: Secret, owner: Recorder, service: Service
) -> None:
    agent = Agent(port, secret)
    await owner.next("open")
    silent = socket.create_connection(("127.0.0.1", port))
    await service.close()
    assert (await owner.next("close"))[1] == "the coordinator is ending"
    await agent.stop()
    silent.close()
    ours = [c for c in psutil.Process().net_connections("inet") if c.laddr.port == port and c.pid]
    assert not [c for c in ours if c.status in (psutil.CONN_LISTEN, psutil.CONN_ESTABLISHED)]


async def test_killed_agent_process_is_seen_at_once(
    port: int, secret: Secret, owner: Recorder, tmp_path: Path, good: Callable[[], Awaitable[None]]
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(secret.pem)
    path.chmod(0o600)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", AGENT_PROGRAM, f"127.0.0.1:{port}", str(path))
    try:
        await owner.next("open", "process")
    finally:
        process.kill()
        await process.wait()
    await owner.next("close", "process")
    await good()


async def test_agent_that_stops_reading_is_cut(
    port: int,
    log: Log,
    owner: Recorder,
    session: aiohttp.ClientSession,
    good: Callable[[], Awaitable[None]],
) -> None:
    async with session.ws_connect(f"https://127.0.0.1:{port}/agent", compress=0) as deaf:
        await deaf.send_str('{"kind":"hello","node":"deaf","node_rank":-1,"processes":1,"address":"","host":"",'
                            '"pid":1,"run_id":"","job_sha256":"","version":"","term_seen":0}')  # fmt: skip
        peer, _ = await owner.next("open", "deaf")
        # Nobody calls deaf.receive(): aiohttp stops reading its socket after a few kilobytes.
        tell = m.Tell(text="x" * m.TRACEBACK_CHARS_MAX)
        closed = asyncio.create_task(owner.next("close", "deaf"))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not closed.done():
                peer.send(tell)
                await asyncio.sleep(0)
        assert "does not read" in closed.result()[1]
        await log.wait_for(lambda lines: any("node deaf" in line and "does not read" in line for line in lines))
    await good()


async def test_owner_that_raises_loses_that_connection_only(
    port: int, secret: Secret, owner: Recorder, log: Log, good: Callable[[], Awaitable[None]]
) -> None:
    on_message = owner.on_message

    def fail(peer: object, message: m.FromAgent) -> None:
        if isinstance(message, m.Goodbye):
            raise KeyError("a mistake of ours")
        on_message(peer, message)  # type: ignore[arg-type]

    owner.on_message = fail  # type: ignore[method-assign]
    agent = Agent(port, secret)
    assert await agent.next_state() is None
    await owner.next("open", "a")
    agent.client.send(m.Goodbye(why=""))
    await owner.next("close", "a")
    await log.wait_for(lambda lines: len(lines) == 1)
    assert log.tracebacks == 1
    await agent.stop()
    await good()


async def test_two_hundred_agents_at_once_are_all_served(port: int, secret: Secret, owner: Recorder, log: Log) -> None:
    agents = [Agent(port, secret, f"n{i}") for i in range(200)]
    peers = {(await owner.next("open"))[0].hello.node for _ in agents}
    assert len(peers) == 200
    assert log.lines == []
    for agent in agents:
        agent.client.stop()
    await asyncio.gather(*(agent.task for agent in agents))


def test_openings_allow_a_whole_cluster_to_come_back() -> None:
    assert door.BACKLOG >= 1024, "1,024 agents that lost their coordinator connect in the same second"
