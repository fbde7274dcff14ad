"""Hosts of a real network: namespaces of the kernel, joined by a switch, whose links can be cut.

Each host has its own interfaces, addresses, ports and routes; processes and files are this machine's. A cut link drops
what is sent over it without a word to either end, as a pulled cable behind a switch or a firewall does: no connection
breaks of it.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Self

OWN_FILES = Path("/etc/netns")  # what is below it hides /etc from what `ip netns exec` runs

_numbers = itertools.count()


class Way(Enum):
    """Which direction of a host's link: nftables has a hook at the switch's port for each."""

    SENDS = "ingress"  # what the host sends does not arrive anywhere
    HEARS = "egress"  # what others send to it does not arrive there


BOTH = (Way.SENDS, Way.HEARS)


def lacking() -> str:
    """Why there can be no networks here, with what would help; "" where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root: run the tests as root"
    missing = [tool for tool in ("ip", "nft") if shutil.which(tool) is None]
    if missing:
        return f"there is no {' and no '.join(missing)}: apt-get install iproute2 nftables"
    try:
        with Network(1) as network:
            network.cut(0)
    except NetworkError as error:
        return f"this kernel or container lets nobody make networks: {error}"
    return ""


class NetworkError(Exception):
    pass


@dataclass
class Network:
    """`count` hosts, 0 and up, and the switch between them. Gone without a trace when its `with` ends."""

    count: int
    name: str = field(default_factory=lambda: f"ft{os.getpid()}-{next(_numbers)}")

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_found: object) -> None:
        self.remove()

    def address(self, host: int) -> str:
        return f"10.83.0.{host + 1}"

    def host_name(self, host: int) -> str:
        """To the host itself, as on many, it is an address of its loopback interface; to the others it is `address`."""
        return f"host{host}"

    def inside(self, host: int, command: list[str]) -> list[str]:
        """The command that runs this one on that host, as the very process that is started."""
        return ["ip", "netns", "exec", self._host(host), *command]

    def cut(self, host: int, ways: tuple[Way, ...] = BOTH) -> None:
        """From now on nothing goes these ways, between this host and all others."""
        rules = "".join(
            f"add table netdev {way.name.lower()}-{host}\n"
            f"add chain netdev {way.name.lower()}-{host} drops "
            f'{{ type filter hook {way.value} device "port{host}" priority 0; policy drop; }}\n'
            for way in ways
        )
        _run("ip", "netns", "exec", self._switch, "nft", "-f", "-", text=rules)

    def heal(self, host: int) -> None:
        """From now on everything goes all ways again."""
        ways = [way for way in Way if f"{way.name.lower()}-{host}" in self._tables()]
        for way in ways:
            _run("ip", "netns", "exec", self._switch, "nft", "delete", "table", "netdev", f"{way.name.lower()}-{host}")

    def remove(self) -> None:
        """All of it. Where nothing is there any more, nothing happens."""
        for host in range(self.count):
            shutil.rmtree(OWN_FILES / self._host(host), ignore_errors=True)
        there = _run("ip", "netns", "list").split()
        for name in (*map(self._host, range(self.count)), self._switch):
            if name in there:
                _run("ip", "netns", "delete", name)

    @property
    def _switch(self) -> str:
        return f"{self.name}-switch"

    def _host(self, host: int) -> str:
        return f"{self.name}-{host}"

    def _tables(self) -> list[str]:
        return _run("ip", "netns", "exec", self._switch, "nft", "list", "tables").split()

    def _make(self) -> None:
        switch = self._switch
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "switch", "up")
        for host in range(self.count):
            name, port = self._host(host), f"port{host}"
            _run("ip", "netns", "add", name)
            _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "-n", switch, "link", "set", port, "master", "switch", "up")
            _run("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", interface, "up")
            names = {other: self.address(other) for other in range(self.count)} | {host: "127.0.1.1"}
            own = OWN_FILES / name
            own.mkdir(parents=True)
            lines = [f"{address} {self.host_name(other)}\n" for other, address in names.items()]
            (own / "hosts").write_text("".join(["127.0.0.1 localhost\n", *lines]))


def networks(count: int) -> Iterator[Network]:
    with Network(count) as network:
        yield network


def _run(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
