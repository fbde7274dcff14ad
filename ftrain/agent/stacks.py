"""Where a worker that hangs is, in Python: it writes that to its own standard error when it is sent a signal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from ftrain.core.local import STACK_CHARS_MAX

WAIT_SECONDS, LOOK_SECONDS = 1.0, 0.05


async def dump(signal_it: Callable[[], None], stderr_log: Path) -> str:
    """Have the worker write its stacks, and return the end of them; "" where it does not, or where no log is kept."""
    before = _size(stderr_log)
    signal_it()
    size = before
    for _ in range(int(WAIT_SECONDS / LOOK_SECONDS)):
        await asyncio.sleep(LOOK_SECONDS)
        now = _size(stderr_log)
        if now == size > before:
            break
        size = now
    try:
        with stderr_log.open("rb") as file:
            file.seek(max(before, size - STACK_CHARS_MAX))
            return file.read(size - file.tell()).decode(errors="replace")
    except OSError:
        return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
