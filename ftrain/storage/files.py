"""Files whose place may be a stranger's: opened and read with care."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ftrain.errors import CorruptCheckpoint


def open_file(path: str | Path, flags: int = 0) -> int:
    """A descriptor for reading. Raises `CorruptCheckpoint` for what is no file: a pipe would be waited for for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptCheckpoint(f"{path} is not a file")
    return descriptor


def read_file(path: str | Path, nbytes_max: int, flags: int = 0) -> bytes:
    """All of it. Raises `CorruptCheckpoint` for what is no file, or larger than it can be."""
    descriptor = open_file(path, flags)
    try:
        nbytes = os.fstat(descriptor).st_size
        if nbytes > nbytes_max:
            raise CorruptCheckpoint(f"{path} has {nbytes} bytes, over the limit of {nbytes_max}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(nbytes_max + 1)
    finally:
        os.close(descriptor)
