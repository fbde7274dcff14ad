"""Processor time and memory of this process and all that it has started."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import time
from pathlib import Path

import psutil

PEAK_RESET = "5"  # /proc/PID/clear_refs: the high-water mark begins anew


def cpu_seconds() -> float:
    """User and system time so far. The kernel's own threads are not in it: they write back the page cache for free."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + children.ru_utime + children.ru_stime
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            seconds += times.user + times.system
    return seconds


def trim() -> None:
    """Give freed memory back to the kernel."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    return sum(status_bytes(pid, "VmRSS") for pid in tree())


def peak_bytes() -> int:
    """The sum of the processes' high-water marks since `reset_peak`; files mapped into memory count."""
    return sum(status_bytes(pid, "VmHWM") for pid in tree())


def reset_peak() -> None:
    for pid in tree():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            Path(f"/proc/{pid}/clear_refs").write_text(PEAK_RESET)


def tree() -> list[int]:
    me = psutil.Process()
    return [me.pid, *(child.pid for child in me.children(recursive=True))]


def status_bytes(pid: int, field: str) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0
