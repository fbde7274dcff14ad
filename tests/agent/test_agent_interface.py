"""Which interface ranks listen on, and how others know this host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftrain.agent import environment, peer_sender
from ftrain.agent.interface import interface_of, is_loopback
from ftrain.spec import JobSpec, Output, Program, Topology
from tests.recovery import namespaces
from tests.recovery.namespaces import Network

LACKING = namespaces.lacking()
ASK = """
import json
from ftrain.agent.interface import interface_of, link_bytes_per_second, outward_address
from ftrain.agent.peer_sender import rate
addresses = ("10.83.0.1", "10.84.0.1", "fd00::7", "127.0.0.1", "10.83.0.2")
speeds = [link_bytes_per_second("eth0"), link_bytes_per_second("eth9"), rate("10.83.0.1"), rate("203.0.113.9")]
print(json.dumps([*map(interface_of, addresses), outward_address(), *speeds]))
"""


def spec(host: str) -> JobSpec:
    return JobSpec(Program("exec", "true", ()), Topology(2, 2, 0, 1, host, 29400), "run", Path(), Output(Path()))


def test_address_of_no_interface_has_none() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert [interface_of(address) for address in ("203.0.113.9", "2001:db8::9", "node-3", "")] == ["", "", "", ""]


def test_loopback_is_told_from_what_others_can_reach() -> None:
    assert [is_loopback(one) for one in ("127.0.1.1", "::1", "10.0.0.1", "fd00::1", "node-3")] == [
        True,
        True,
        *[False] * 3,
    ]


def test_ranks_of_several_hosts_meet_where_the_node_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert (
        environment.base(spec("10.0.0.1"), "127.0.0.1")["GLOO_SOCKET_IFNAME"] == "lo"
    )  # the interface of that address
    assert "GLOO_SOCKET_IFNAME" not in environment.base(spec("10.0.0.1"), "203.0.113.9")
    assert environment.base(spec("localhost"), "")["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert environment.base(spec("10.0.0.1"), "127.0.0.1")["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.skipif(bool(LACKING), reason=LACKING)
def test_every_address_of_an_interface_is_found_and_its_speed() -> None:
    with Network(1) as network:
        for address, device in (("10.84.0.1/32", "eth0"), ("fd00::7/128", "eth0")):
            add = ["ip", "address", "add", address, "dev", device]
            subprocess.run(network.inside(0, add), check=True, timeout=30)
        command = network.inside(0, [sys.executable, "-c", ASK])
        found = subprocess.run(command, check=True, capture_output=True, timeout=60, env=dict(os.environ)).stdout
    names, speeds = json.loads(found)[:6], json.loads(found)[6:]
    assert names == ["eth0", "eth0", "eth0", "lo", "", network.address(0)]
    assert speeds == [1_250_000_000, 0, 312_500_000, peer_sender.BYTES_PER_SECOND], "veth says 10 Gbit/s"
