"""From what a user gives, a path or a URL, to the storage there: the one place that knows the schemes."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ftrain.errors import UsageError
from ftrain.storage.base import Storage
from ftrain.storage.posix import PosixStorage
from ftrain.storage.spread import SpreadStorage, has_disks

SCHEMES = ("s3", "gs", "az")
_ATTEMPT = re.compile(r"checkpoints/step-\d+/g\d+-a\d+")


def open_storage(url: str) -> Storage:
    """The storage at a path, or at a URL: `file://`, `s3://`, `gs://`, `az://`. Nothing is read or written yet.

    Credentials are those of the environment. Raises `UsageError` for any other scheme, and for a path to a file.
    """
    if is_url(url):
        scheme, _, rest = url.partition("://")
        if scheme in SCHEMES:
            return _object_store(scheme, rest)
        parts = urlsplit(url)
        if scheme != "file" or parts.netloc not in ("", "localhost"):
            raise UsageError(f"{url}: give a path, or a URL that begins with file:///, s3://, gs:// or az://")
        url = unquote(parts.path)
    if not url:
        raise UsageError("an empty path cannot be a storage directory; name a directory")
    if Path(url).exists() and not Path(url).is_dir():
        raise UsageError(f"{url} is not a directory; name a directory that can be written to")
    return SpreadStorage(url) if has_disks(url) else PosixStorage(url)


def open_run(url: str, disks: Sequence[str] = ()) -> Storage:
    """The storage of a run that goes on here: its new packs are spread over its directory and `disks`.

    Packs that other nodes write to disks of theirs are found, too. Raises `UsageError` as `open_storage` does, and for
    disks where the run is in an object store.
    """
    storage = open_storage(url)
    if isinstance(storage, PosixStorage):
        return SpreadStorage(storage.url, disks)
    if disks:
        raise UsageError(f"--disks {','.join(disks)}: only a run in a directory has disks; {url} is an object store")
    return storage


def open_parent(place: str | Path) -> tuple[Storage, str]:
    """The storage that holds the directory `place` (a path or a URL), and its name there. Raises `UsageError`."""
    if is_url(str(place)):
        parent, _, name = str(place).rstrip("/").rpartition("/")
        if not parent.partition("://")[2].strip("/"):
            raise UsageError(f"{place}: name what is to become the checkpoint, as in s3://BUCKET/NAME")
        return open_storage(parent), name
    path = Path(place).absolute()
    if path.is_symlink():  # who names it may follow it; what a checkpoint itself holds of links is not followed
        path = path.resolve()
    if not path.name:
        raise UsageError(f"{place}: name the directory that is to become the checkpoint")
    return open_storage(str(path.parent)), path.name


class Opener:
    """`open_parent` for who saves again and again: what is below the same directory has the same storage."""

    def __init__(self) -> None:
        self._last: tuple[str, str] = "", ""
        self._storage: Storage | None = None

    def open(self, place: str | Path) -> tuple[Storage, str]:
        """As `open_parent`, which looks at the directory the first time only."""
        text = str(place).rstrip("/")
        parent, _, name = text.rpartition("/")
        above = parent, "" if text.startswith("/") or "://" in text else os.getcwd()
        if self._storage is not None and above == self._last and name not in ("", ".", "..") and not _is_link(text):
            return self._storage, name
        self._storage, name = open_parent(place)
        self._last = above
        return self._storage, name


def _is_link(path: str) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def open_in_run(place: str | Path) -> tuple[Storage, str]:
    """As `open_parent`; but for an attempt of a run the run's storage, as the attempt may refer to others there."""
    run, name = split_attempt(absolute(place))
    return (open_storage(run), name) if run else open_parent(place)


def split_attempt(place: str) -> tuple[str, str]:
    """An attempt's path or URL as that of its run, and its name there; "" and "" for what is none."""
    names = place.split("/")
    run, name = "/".join(names[:-3]), "/".join(names[-3:])
    return (run, name) if _ATTEMPT.fullmatch(name) else ("", "")


def absolute(place: str | Path) -> str:
    """A URL, or a path that does not depend on the current folder, without a slash at its end."""
    return str(place).rstrip("/") if is_url(str(place)) else str(Path(place).absolute())


def is_url(place: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def _object_store(scheme: str, rest: str) -> Storage:
    # Only who uses an object store loads the library and has its threads.
    from ftrain.storage.bucket import StoreBucket
    from ftrain.storage.object_store import ObjectStorage

    bucket, _, prefix = rest.partition("/")
    if "//" in rest or any(name in (".", "..") for name in prefix.split("/")):
        raise UsageError(f"{scheme}://{rest}: empty names, . and .. cannot be in it")
    return ObjectStorage(StoreBucket(scheme, bucket, prefix.strip("/")))
