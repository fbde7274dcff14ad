"""A connection over a link that is cut: the kernel gives it up, whether anything was to be sent or not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.recovery import namespaces
from tests.recovery.namespaces import Network

LACKING = namespaces.lacking()
SERVER = """
import socket
with socket.create_server(("", 5000)) as listening:
    print("ready", flush=True)
    kept = [listening.accept() for _ in range(2)]
    input()
"""
CLIENT = """
import socket, sys
from ftrain.control import silence
silence.SILENT_SECONDS, silence.PROBE_SECONDS = 3, 1
quiet, sending = (socket.create_connection((sys.argv[1], 5000), 5.0) for _ in range(2))
for one in (quiet, sending):
    one.settimeout(60.0)
    silence.bound_silence(one)
print("connected", flush=True)
input()
sending.send(b"x")
for one in (quiet, sending):
    try:
        one.recv(1)
    except OSError as error:
        print(error.errno, flush=True)
"""


@pytest.fixture
def network() -> Iterator[Network]:
    yield from namespaces.networks(2)


@pytest.mark.skipif(bool(LACKING), reason=LACKING)
def test_connection_over_a_cut_link_fails_whether_it_sends_or_not(network: Network) -> None:
    def start(host: int, *program: str) -> subprocess.Popen[str]:
        command = network.inside(host, [sys.executable, "-c", *program])
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start(0, SERVER) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        with start(1, CLIENT, network.address(0)) as client:
            assert client.stdout is not None
            assert client.stdin is not None
            assert client.stdout.readline() == "connected\n"
            network.cut(1)
            client.stdin.write("\n")
            client.stdin.flush()
            found = client.stdout.readlines()
        server.kill()
    timed_out, unreachable = "110\n", "113\n"  # ETIMEDOUT; EHOSTUNREACH where the neighbour was given up first
    assert len(found) == 2
    assert set(found) <= {timed_out, unreachable}
