"""The folder that the benchmark writes to, and the page cache over it."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
READ_BYTES = 8 << 20


class RefusedError(Exception):
    """The folder is of no use for what is measured."""


def file_system(path: Path) -> str:
    """The type of the file system that a folder is on, as the kernel names it."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, rest = line.partition(" - ")
        if mount.split()[2] == wanted:
            return rest.split()[0]
    return "unknown"


def refuse_memory(path: Path) -> None:
    """Raises RefusedError where writing would be copying in memory."""
    found = file_system(path)
    if found in MEMORY_FILE_SYSTEMS:
        raise RefusedError(f"{path} is on {found}, which is memory: give a folder on a disk with --dir")


def remove(path: Path) -> None:
    """Remove a folder, and let nothing of it or before it be left to write when the next thing is timed."""
    shutil.rmtree(path, ignore_errors=True)
    os.sync()


def drop_cache(path: Path) -> str:
    """Make what is read from `path` next come from the disk; what did that."""
    os.sync()
    for file in files_below(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    with contextlib.suppress(OSError):
        DROP_CACHES.write_text("3")
        return "posix_fadvise and drop_caches"
    return "posix_fadvise only: drop_caches needs root"


def fill_cache(path: Path) -> None:
    """Read every file once through the page cache."""
    buffer = bytearray(READ_BYTES)
    for file in files_below(path):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def files_below(path: Path) -> list[Path]:
    return [found for found in path.rglob("*") if found.is_file()]
