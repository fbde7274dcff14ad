"""What a worker's process, with its children, has used so far: whether it works or only waits."""

from __future__ import annotations

import os
from pathlib import Path

from ftrain.agent import proc
from ftrain.core.hangs import Usage

TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
WORKING = "RD"
POLLING = ("gloo_tcp_loop",)  # threads that wake a hundred times a second, with nothing to do
STOPPED, TRACED = "T", "t"
# Words of /proc/PID/stat, the name taken as one word.
NAME, STATE, CPU = 0, 1, slice(12, 16)  # user and system time, and that of children that were waited for
IO_BYTES = ("rchar", "wchar", "read_bytes", "write_bytes")


def state(pid: int) -> str:
    """The process's state as one letter (proc(5)); "" if it is gone."""
    words = _stat(f"/proc/{pid}/stat")
    return words[STATE] if words else ""


def usage(pid: int) -> Usage:
    """Of `pid` and its descendants. What has gone meanwhile counts as nothing, and is missed in `processes`."""
    processes = [pid, *proc.descendants(pid)]
    ticks, at_work = 0, False
    for one in processes:
        threads = list(filter(None, map(_stat, _threads(one))))
        polling = [words for words in threads if words[NAME].startswith(POLLING)]
        # Those of threads that have ended are in the process's own count only.
        ticks += sum(_ticks(words) for words in [_stat(f"/proc/{one}/stat")] if words) - sum(map(_ticks, polling))
        at_work |= any(words[STATE] in WORKING for words in threads if words not in polling)
    return Usage(ticks * TICK_SECONDS, sum(map(_io_bytes, processes)), frozenset(processes), at_work)


def _threads(pid: int) -> list[str]:
    try:
        return [f"/proc/{pid}/task/{one}/stat" for one in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _ticks(words: list[str]) -> int:
    return sum(map(int, words[CPU]))


def _io_bytes(pid: int) -> int:
    """Read and written, from files or pipes and from disks; sockets mostly are not counted by the kernel."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:  # a process of another user does not say
        return 0
    found = dict(line.split(": ") for line in lines)
    return sum(int(found[name]) for name in IO_BYTES if name in found)


def _stat(path: str) -> list[str]:
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return []
    name, _, rest = text.partition(" ")[2].rpartition(")")
    return [name.removeprefix("("), *rest.split()]
