"""What a supervisor needs of Linux: what /proc tells about processes, and its own freed memory given back."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def children(pid: int) -> list[int]:
    """The living (and not yet reaped) direct children of `pid`; none if it is gone."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(word) for word in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on, parents first."""
    found = children(pid)
    for known in found:  # grows while it is walked
        found += [one for one in children(known) if one not in found]
    return found


def session(pid: int) -> int:
    """The session of `pid`, 0 if it is gone."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def heap_bytes(pid: int) -> int:
    """How long the heap of `pid` is, from which the C library gives out what is not large. 0 if there is none."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    ranges = [line.split()[0].split("-") for line in lines if line.endswith("[heap]")]
    return sum(int(end, 16) - int(begin, 16) for begin, end in ranges)


def threads() -> int:
    """How many threads this process has, those of native libraries included."""
    return len(os.listdir("/proc/self/task"))


def trim_heap() -> None:
    """Give the system back what this process has freed. In a few milliseconds; nothing where the C library cannot.

    glibc keeps freed pages that lie below others in use, and every recovery would leave some kilobytes of them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
