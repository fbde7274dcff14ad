"""The agent's side: it comes back by itself, and says what kind of trouble it is in."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from control_parties import Agent, Recorder, hello

from ftrain.control.client import Client, fetch_status, parse_endpoint
from ftrain.control.secret import Secret
from ftrain.control.service import Service
from ftrain.core import messages as m
from ftrain.errors import ProtocolError, Refused, Unavailable, UsageError


async def test_restarted_coordinator_gets_a_new_hello(owner: Recorder, secret: Secret) -> None:
    first = Service(owner, secret)
    port = await first.start()
    agent = Agent(port, secret)
    assert await agent.next_state() is None
    assert (await owner.next("open"))[1].term_seen == 1
    await first.close()
    assert isinstance(await agent.next_state(), Unavailable)
    assert not agent.client.send(m.Goodbye(why="nobody hears this"))
    second_owner = Recorder()
    second = Service(second_owner, secret, port=port)
    assert await second.start() == port
    _, again = await second_owner.next("open")
    assert again.term_seen == agent.hellos > 1
    while (state := await agent.next_state()) is not None:
        assert isinstance(state, Unavailable)
    await agent.stop()
    await second.close()


async def test_connection_given_up_is_made_again(port: int, secret: Secret, owner: Recorder) -> None:
    agent = Agent(port, secret)
    assert await agent.next_state() is None
    await owner.next("open")
    agent.client.reconnect()
    error = await agent.next_state()
    assert isinstance(error, Unavailable)
    assert "is silent" in str(error)
    assert await agent.next_state() is None
    assert (await owner.next("open"))[1].term_seen == 2
    await agent.stop()


async def test_nobody_listening_is_unavailable_and_tried_again(secret: Secret, unused_port: int) -> None:
    agent = Agent(unused_port, secret)
    for _ in range(3):
        error = await agent.next_state()
        assert isinstance(error, Unavailable)
        assert "nobody listens" in str(error)
    await agent.stop()


async def test_unknown_host_is_unavailable(secret: Secret) -> None:
    with pytest.raises(Unavailable, match=r"no-such-host\.invalid:1 cannot be found"):
        await fetch_status("no-such-host.invalid:1", secret)


async def test_other_server_with_other_secret_is_refused(port: int, other_secret: Secret) -> None:
    with pytest.raises(Refused, match="does not hold this run's secret"):
        await fetch_status(f"127.0.0.1:{port}", other_secret)


async def test_refusal_of_our_certificate_is_refused(secret: Secret, other_secret: Secret, tmp_path: Path) -> None:
    """In TLS 1.3 it arrives after the handshake, with the first read."""
    (tmp_path / "shown").write_bytes(secret.pem)
    strict = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    strict.load_cert_chain(tmp_path / "shown")
    strict.load_verify_locations(cadata=other_secret.certificate)
    strict.verify_mode = ssl.CERT_REQUIRED
    with _listening(lambda connection: _shake_hands(connection, strict)) as port:
        with pytest.raises(Refused, match="does not accept this run's secret"):
            await fetch_status(f"127.0.0.1:{port}", secret)
        agent = Agent(port, secret)
        assert isinstance(await agent.next_state(), Refused)
        await agent.stop()


async def test_plain_http_server_is_a_protocol_error(secret: Secret) -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with _listening(answer) as port, pytest.raises(ProtocolError, match="something else listens"):
        await fetch_status(f"127.0.0.1:{port}", secret)


async def test_server_that_hangs_up_is_unavailable(secret: Secret) -> None:
    with _listening(socket.socket.close) as port, pytest.raises(Unavailable, match="hung up"):
        await fetch_status(f"127.0.0.1:{port}", secret)


async def test_server_that_says_nothing_is_unavailable(secret: Secret, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftrain.control.client.CONNECT_SECONDS", 0.3)
    release = threading.Event()
    with _listening(lambda _: release.wait()) as port:
        with pytest.raises(Unavailable, match="did not answer within"):
            await fetch_status(f"127.0.0.1:{port}", secret)
        agent = Agent(port, secret)
        assert isinstance(await agent.next_state(), Unavailable)
        await agent.stop()
        release.set()


async def test_stop_while_connecting_returns(secret: Secret) -> None:
    release, accepted = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(connection: socket.socket) -> None:
        loop.call_soon_threadsafe(accepted.set)
        release.wait()

    with _listening(hold) as port:
        agent = Agent(port, secret)
        await accepted.wait()
        await agent.stop()
        release.set()
    assert agent.states.empty()


async def test_coordinator_that_breaks_the_protocol_is_left_and_tried_again(
    port: int, secret: Secret, owner: Recorder
) -> None:
    agent = Agent(port, secret)
    assert await agent.next_state() is None
    peer, _ = await owner.next("open")
    peer._channel.send(b'{"kind":"hello"}')
    error = await agent.next_state()
    assert isinstance(error, ProtocolError)
    assert await agent.next_state() is None
    await agent.stop()


@pytest.mark.parametrize("bad", ["", "host", "host:", ":1", "host:0", "host:65536", "::1:5", "a b:1", "h/x:1"])
async def test_endpoint_that_is_none_is_a_usage_error(bad: str, secret: Secret) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        Client(bad, secret)


def test_endpoints_parse() -> None:
    assert parse_endpoint("node-0.svc:29400") == ("node-0.svc", 29400)
    assert parse_endpoint("[fd00::1]:1") == ("fd00::1", 1)


async def test_oversized_message_is_refused_by_its_sender(secret: Secret, unused_port: int) -> None:
    report = m.ErrorReport("E", "e" * m.TRACEBACK_CHARS_MAX, "t" * m.TRACEBACK_CHARS_MAX)
    exits = tuple(m.RankExit(i, i, 1, 1, error=report) for i in range(64))
    with pytest.raises(ProtocolError, match=r"A Hello of \d+ bytes is more than a message may have"):
        Client(f"127.0.0.1:{unused_port}", secret).send(hello(report=m.Report(exits=exits)))


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _listening(serve: Callable[[socket.socket], object]) -> Iterator[int]:
    """Something that listens, in a thread of its own, and treats each connection as `serve` says."""
    listener = socket.create_server(("127.0.0.1", 0))

    def loop() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    serve(connection)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def _shake_hands(connection: socket.socket, context: ssl.SSLContext) -> None:
    with context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) as wrapped:
        try:
            wrapped.do_handshake()
        except ssl.SSLError:
            # Closed with the client's request unread, a socket resets, and the alert may be lost with it.
            raw = socket.socket(fileno=wrapped.detach())
            with raw:
                raw.shutdown(socket.SHUT_WR)
                while raw.recv(4096):
                    pass
