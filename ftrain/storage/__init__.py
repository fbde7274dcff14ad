"""Where checkpoints and the journal live: `open_storage` gives the `Storage` for a URL or a path."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from ftrain.errors import UsageError
from ftrain.storage.base import Storage
from ftrain.storage.posix import PosixStorage

__all__ = ["PosixStorage", "Storage", "open_storage"]


def open_storage(url: str) -> Storage:
    """The storage at a path or a `file://` URL. Raises `UsageError` for any other scheme, and for a path to a file."""
    if "://" in url:
        parts = urlsplit(url)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            raise UsageError(f"{url}: this version stores to file systems only; give a path, or mount the store as one")
        url = unquote(parts.path)
    if not url:
        raise UsageError("an empty path cannot be a storage directory; name a directory")
    if Path(url).exists() and not Path(url).is_dir():
        raise UsageError(f"{url} is not a directory; name a directory that can be written to")
    return PosixStorage(url)
