"""This host's network interfaces and addresses: where its ranks listen, and where their peers find them."""

from __future__ import annotations

import array
import contextlib
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

SIOCGIFCONF = 0x8912
ELSEWHERE = "192.0.2.1"  # set aside for documentation: nobody's, so the default route leads there
_ENTRY_BYTES = 40  # a name of 16 bytes, an address of 24
_NAME_BYTES = 16
_ENTRIES_MAX = 1024


def interface_of(address: str) -> str:
    """The interface with this IPv4 or IPv6 address; "" where none has it, or it is no address."""
    with contextlib.suppress(ValueError, OSError):
        wanted = ipaddress.ip_address(address.partition("%")[0])
        return _ipv4(wanted) if wanted.version == 4 else _ipv6(wanted)
    return ""


def link_bytes_per_second(interface: str) -> int:
    """How much the interface can send, as its driver says; 0 where it does not, as on most virtual machines."""
    with contextlib.suppress(ValueError, OSError):
        return max(0, int((Path("/sys/class/net") / interface / "speed").read_text())) * 125_000
    return 0


def outward_address() -> str:
    """An address of this host that others may know it by: that of its default route, or of any interface; "" if none.

    For a host whose own name is an address of the loopback interface to itself, as Debian's installer leaves it.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((ELSEWHERE, 9))  # nothing is sent
        return str(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        return next((address for _, address in _ipv4_addresses() if not is_loopback(address)), "")
    return ""


def is_loopback(address: str) -> bool:
    """Whether only this host itself is reached there."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return False


def _ipv4(wanted: ipaddress.IPv4Address) -> str:
    return next((name for name, address in _ipv4_addresses() if address == str(wanted)), "")


def _ipv4_addresses() -> Iterator[tuple[str, str]]:
    """Interfaces and their addresses, SIOCGIFCONF's list: those that an interface has beside its first included."""
    found = array.array("B", bytes(_ENTRIES_MAX * _ENTRY_BYTES))
    place, _ = found.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        answer = fcntl.ioctl(asked, SIOCGIFCONF, struct.pack("iP", len(found), place))
    (filled,) = struct.unpack_from("i", answer)
    entries = found.tobytes()[:filled]
    for at in range(0, filled, _ENTRY_BYTES):
        label = entries[at : at + _NAME_BYTES].split(b"\0", 1)[0].decode()
        address = socket.inet_ntoa(entries[at + _NAME_BYTES + 4 : at + _NAME_BYTES + 8])
        yield label.partition(":")[0], address  # an address of its own may be labelled eth0:1


def _ipv6(wanted: ipaddress.IPv6Address) -> str:
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, *_, name = line.split()
        if bytes.fromhex(digits) == wanted.packed:
            return name
    return ""
