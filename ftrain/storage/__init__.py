"""Where checkpoints and the journal live: `open_storage` gives the `Storage` for a URL or a path."""

from __future__ import annotations

from ftrain.storage.base import Storage
from ftrain.storage.opening import Opener, open_in_run, open_parent, open_run, open_storage
from ftrain.storage.posix import PosixStorage

__all__ = ["Opener", "PosixStorage", "Storage", "open_in_run", "open_parent", "open_run", "open_storage"]
