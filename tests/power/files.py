"""Copies of disks."""

from __future__ import annotations

import os
from pathlib import Path

COPY_BYTES = 1 << 22


def copy_sparse(source: Path, target: Path) -> None:
    """Only what is there: a file system of hundreds of megabytes is mostly holes."""
    with source.open("rb") as read, target.open("wb") as written:
        size = os.fstat(read.fileno()).st_size
        written.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(read.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                return
            end = os.lseek(read.fileno(), at, os.SEEK_HOLE)
            os.lseek(written.fileno(), at, os.SEEK_SET)
            while at < end:
                at += os.sendfile(written.fileno(), read.fileno(), at, min(COPY_BYTES, end - at))
