"""Bugs that are planted in a real run: those of tests/crash/bugs.py with which one gets as far as a commit.

ext4 and XFS keep one journal for all files, and a flush is one of the whole disk: the sync of whatever is written next
makes up for some that were left out, so that only tests/crash, whose file system promises no more than POSIX, finds
those.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ftrain.storage import posix
from tests.crash.bugs import planted as planted_there

FOUND = ("the file is not synced", "the directory is not synced")
NO_SYNC_OF_PACKS = "a pack is not synced"
MADE_UP_FOR = ("directories above are not synced", NO_SYNC_OF_PACKS)
BUGS = (*FOUND, *MADE_UP_FOR)


def planted(name: str) -> AbstractContextManager[Any]:
    """With this bug in place."""
    return _packs_not_synced() if name == NO_SYNC_OF_PACKS else planted_there(name)


def _packs_not_synced() -> AbstractContextManager[Any]:
    real = posix._write_synced

    def write(temporary: Path, flags: int, write: Callable[[int], Any]) -> Any:
        if not flags & os.O_DIRECT:
            return real(temporary, flags, write)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o644)
        try:
            return write(descriptor)
        finally:
            os.close(descriptor)

    return patch.object(posix, "_write_synced", write)
