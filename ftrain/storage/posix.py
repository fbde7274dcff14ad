"""Storage in a directory of a POSIX file system, local or shared between nodes.

A file is written under a temporary name beside its own, synced, and only then linked to its name: `link` fails
where the name is taken, so that creation is exclusive and a name never stands for half a file. Then its directory
is synced. A sync that failed is not tried again: the kernel may have dropped the pages and would report success.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import uuid
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ftrain import _native
from ftrain._native import Pack
from ftrain.core.layout import ALIGNMENT_BYTES
from ftrain.errors import AlreadyExists, CorruptCheckpoint, NotFound, StorageError, UnknownOutcome, UsageError
from ftrain.storage.base import Effort, Ranges
from ftrain.storage.files import open_file, read_file
from ftrain.storage.neighbours import Neighbours
from ftrain.storage.pace import Pace
from ftrain.storage.pack import Stream

READ_THREADS = 2
READ_BYTES_MAX = 1 << 30  # of a file that is read whole; packs never are
FILES_MAX = 256  # open at a time
CACHED_SHARE_MIN = 0.5  # of a file, from which reading it through the page cache is faster
SYNCED_KEPT = 1024  # directories that are remembered as durable: a long run makes two with each commit
_MAKE_TRIES = 8
# A link that failed with one of these was not made. After any other error (an I/O error, a server that is gone) it may
# have been, or may yet be.
_LINK_REFUSED = frozenset(
    (
        errno.EACCES, errno.EDQUOT, errno.EINVAL, errno.EMLINK, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC,
        errno.ENOSYS, errno.ENOTDIR, errno.EOPNOTSUPP, errno.EPERM, errno.EROFS, errno.EXDEV,
    )
)  # fmt: skip

_T = TypeVar("_T")


class PosixStorage:
    """`Storage` under the directory `root`, which is made when something is first written."""

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root).absolute()
        self._neighbours = Neighbours.of_environment()
        self._synced: set[tuple[str, int]] = set()  # (directory, inode): its name and all above it are durable
        # Paths, and directories, whose sync failed: a later one would succeed and prove nothing, only a crash shows.
        self._doubtful: set[str] = set()
        self._doubtful_directories: set[Path] = set()
        self._syncing = threading.Lock()

    @property
    def url(self) -> str:
        return str(self._root)

    def check(self) -> None:
        probe = f".ftrain-probe-{uuid.uuid4().hex}"
        try:
            self.create(probe, b"")
            with contextlib.suppress(AlreadyExists):
                self.create(probe, b"")
                raise UsageError(f"{self.url}: this file system lets a name be taken twice; use another")
        except StorageError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                return  # what is there can be read, and room can be made while training goes on
            raise UsageError(f"{self.url} cannot be used: {error}") from None
        finally:
            with contextlib.suppress(OSError):
                self._path(probe).unlink(missing_ok=True)

    def create(self, path: str, data: bytes) -> None:
        self._create(path, len(data), 0, lambda descriptor: _write_all(descriptor, memoryview(data)))

    def confirm(self, path: str, data: bytes) -> bool:
        target = self._within(path)
        self._refuse_doubtful(path)
        try:
            if read_file(target, READ_BYTES_MAX) != data:
                return False
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _failure("cannot confirm", target, error) from error
        return self._make_durable(path, target)

    def _make_durable(self, path: str, file: Path) -> bool:
        """The content of `file`, and the name `path` that leads to it; False where it is gone meanwhile."""
        place = self._path(path)
        try:
            self._sync_directories(place.parent)
            _sync(file)
            _sync(place.parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._doubtful.add(path)
            raise _failure("cannot confirm", place, error) from error
        return True

    def write_pack(
        self, path: str, pack: Pack, effort: Effort, *, should_stop: Callable[[], bool]
    ) -> tuple[list[int], list[int]]:
        pace = self._pace(path, effort, should_stop)

        def write(descriptor: int) -> tuple[list[int], list[int]]:
            pace.stop_if_over()
            return pack.write(
                descriptor,
                threads=effort.threads,
                nice=effort.nice,
                bytes_per_second_max=effort.bytes_per_second_max,
                processors_max=effort.processors_max,
                on_idle=pace.stop_if_over,
            )

        return self._create_directly(path, pack.nbytes, write)

    def write_stream(self, path: str, stream: Stream, effort: Effort, *, should_stop: Callable[[], bool]) -> None:
        def write(descriptor: int) -> None:
            pace = self._pace(path, effort, should_stop)
            done = 0
            with contextlib.closing(iter(stream)) as parts:
                for part in parts:
                    pace(done)
                    _write_all(descriptor, part)
                    done += len(part)

        self._create_directly(path, stream.nbytes_max, write)

    def read(self, path: str) -> bytes:
        target = self._within(path)
        self._refuse_doubtful(path)
        try:
            return read_file(target, READ_BYTES_MAX)
        except OSError as error:
            raise _failure("cannot read", target, error) from error

    def read_ranges(self, ranges: Ranges) -> list[int]:
        shared = self._are_shared(ranges)
        if len(ranges.paths) <= FILES_MAX:
            return self._read_ranges(ranges, shared)
        damaged: list[int] = []
        for first in range(0, len(ranges.paths), FILES_MAX):
            part, places = _of_files(ranges, first, first + FILES_MAX)
            damaged += [places[place] for place in self._read_ranges(part, shared)]
        return sorted(damaged)

    def _are_shared(self, ranges: Ranges) -> bool:
        """Whether other ranks of this node seem to read the same: then it goes through the page cache."""
        if self._neighbours.ranks == 1:
            return False
        return self._neighbours.read_twice(sum(ranges.sizes), sum(map(self.size, ranges.paths)))

    def _read_ranges(self, ranges: Ranges, shared: bool) -> list[int]:
        files: list[tuple[int, bool]] = []
        paths, where = ranges.paths, self._path("")
        try:
            for path in paths:
                where = self._within(path)
                files.append(_open_to_read(where, self._neighbours if shared else None))
            where = self._path(paths[0]) if len(paths) == 1 else self._path("")
            return _native.fetch(
                files, ranges.files, ranges.sums, ranges.offsets, ranges.sizes, ranges.addresses, threads=READ_THREADS
            )
        except EOFError as error:
            raise CorruptCheckpoint(f"{where}: a file was cut short: {error}") from None
        except OSError as error:
            raise _failure("cannot read", where, error) from error
        finally:
            for descriptor, _ in files:
                os.close(descriptor)

    def size(self, path: str) -> int:
        target = self._path(path)
        try:
            return target.stat().st_size
        except OSError as error:
            raise _failure("cannot read", target, error) from error

    def exists(self, path: str) -> bool:
        target = self._path(path)
        try:
            target.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise _failure("cannot read", target, error) from error
        return True

    def list(self, prefix: str) -> list[str]:
        target = self._path(prefix)
        try:
            return sorted(entry.name for entry in target.iterdir() if not entry.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _failure("cannot list", target, error) from error

    def remove_tree(self, path: str) -> None:
        target = self._path(path)
        try:
            if target.is_symlink():  # not ours, and what it leads to even less
                target.unlink()
                return
            self._within(path)
            # Its own files first: without the manifest nobody takes a half removed checkpoint for a whole one.
            for entry in sorted(target.iterdir()):
                if not entry.is_dir():
                    entry.unlink(missing_ok=True)
            shutil.rmtree(target)
        except FileNotFoundError:
            if target.exists():  # somebody else removes it too, or still wrote to it
                shutil.rmtree(target, ignore_errors=True)
        except OSError as error:
            raise _failure("cannot remove", target, error) from error
        for parent in target.parents:
            if parent == self._root or parent.parent == self._root:
                return
            try:
                parent.rmdir()
            except OSError:
                return

    def _path(self, path: str) -> Path:
        parts = path.split("/") if path else []
        if any(part in ("", ".", "..") for part in parts):
            raise StorageError(f"{path!r} is not a path inside of {self._root}")
        return self._root.joinpath(*parts)

    def _within(self, path: str) -> Path:
        """The file at `path`. Raises `CorruptCheckpoint` where links lead elsewhere: a stranger may have set them."""
        target = self._path(path)
        found = os.path.realpath(target)
        # What lies beside the first level is out of bounds, too: it may be a checkpoint that was opened by its parent.
        bound = os.path.join(os.path.realpath(self._root), path.split("/")[0] if "/" in path else "")
        if os.path.commonpath((bound, found)) != (bound.rstrip("/") or "/"):
            raise CorruptCheckpoint(
                f"{target} leads through a link to {found}, which is not followed out of {bound}; if the link is "
                "yours, mount or copy what it leads to"
            )
        return target

    def _refuse_doubtful(self, path: str) -> None:
        if path in self._doubtful:
            raise UnknownOutcome(
                f"{self._path(path)} may be gone after a crash: syncing its directory failed; check the disk"
            )

    def _pace(self, path: str, effort: Effort, should_stop: Callable[[], bool]) -> Pace:
        return Pace(effort.bytes_per_second_max, should_stop, str(self._path(path)))

    def _create_directly(self, path: str, nbytes: int, write: Callable[[int], _T]) -> _T:
        """As `_create`, past the page cache where the file system does that; `write` may be called twice."""
        try:
            return self._create(path, nbytes, os.O_DIRECT, write)
        except _NoDirectIO:
            return self._create(path, nbytes, 0, write)

    def _create(self, path: str, nbytes: int, flags: int, write: Callable[[int], _T]) -> _T:
        target = self._path(path)
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"

        def put() -> _T:
            try:
                result = _write_synced(temporary, flags, write)
                _link(temporary, target)
            except OSError as error:
                if flags & os.O_DIRECT and error.errno == errno.EINVAL:
                    raise _NoDirectIO from error
                raise
            return result

        try:
            return self._put(path, f"cannot write {nbytes} bytes to", put)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _refer(self, path: str, to: str) -> None:
        """Make `path` a symbolic link to what is durable already; raises as `create`."""
        self._put(path, "cannot make a link at", lambda: _symlink(to, self._path(path)))

    def _put(self, path: str, what: str, put: Callable[[], _T]) -> _T:
        """Make the name `path` by `put`, in directories that are durable, and then make it durable itself."""
        target = self._path(path)
        try:
            self._make_directories(target.parent)
            self._within(path)
            result = put()
        except _LinkUnknown as error:
            raise UnknownOutcome(f"{target} may or may not have been made: {error}") from error
        except OSError as error:
            raise _failure(what, target, error) from error
        try:
            _sync(target.parent)
        except OSError as error:
            self._doubtful.add(path)
            raise UnknownOutcome(
                f"{target} was written, but its directory could not be synced ({os.strerror(error.errno or 0)}): "
                "it may be gone after a crash; check the disk"
            ) from error
        return result

    def _make_directories(self, directory: Path) -> None:
        """Make what is missing, durably. Another process may remove an emptied directory meanwhile: then once more."""
        for last in (*(False,) * (_MAKE_TRIES - 1), True):
            try:
                directory.mkdir(parents=True, exist_ok=True)
                self._sync_directories(directory)
                return
            except FileNotFoundError:
                if last:
                    raise

    def _sync_directories(self, directory: Path) -> None:
        """Make the names of the directory and of all above it, up to the root, durable.

        Also of those that were there already: who made them may have crashed before the sync. What is above a
        directory that is not known is synced anew: it may have been removed since, and another made in its place,
        even with the same inode.
        """
        with self._syncing:
            if _identity(directory) in self._synced:
                return
            above = [directory, *directory.parents]
            chain = above[: above.index(self._root) + 1]
            for name in reversed(chain):
                self._sync_name(name)
            found = set(map(_identity, chain))
            if len(self._synced | found) > SYNCED_KEPT:
                self._synced.clear()  # what is forgotten is synced once more, when it is next written into
            self._synced |= found

    def _sync_name(self, directory: Path) -> None:
        if directory in self._doubtful_directories:
            raise StorageError(f"{directory} may be gone after a crash: syncing its name failed before; check the disk")
        try:
            _sync(directory.parent)
        except PermissionError:
            if directory != self._root:  # what holds the root need not be ours
                raise
        except FileNotFoundError:
            raise
        except OSError:
            self._doubtful_directories.add(directory)
            raise


def _identity(directory: Path) -> tuple[str, int]:
    return str(directory), directory.stat().st_ino


class _NoDirectIO(Exception):
    """This file system does not do direct I/O."""


class _LinkUnknown(Exception):
    """A link failed in a way that does not say whether it was made."""


def _write_synced(temporary: Path, flags: int, write: Callable[[int], _T]) -> _T:
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | flags, 0o644)
    try:
        result = write(descriptor)
        os.fsync(descriptor)
        return result
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _open_to_read(path: Path, neighbours: Neighbours | None) -> tuple[int, bool]:
    """A descriptor, and whether it is for direct I/O: what the page cache holds is not read from the disk again.

    `neighbours` read it, too: each has a part of it brought to the page cache, from which all then read all of it.
    """
    descriptor = open_file(path)
    if neighbours is not None:
        os.posix_fadvise(descriptor, *neighbours.share(os.fstat(descriptor).st_size), os.POSIX_FADV_WILLNEED)
        return descriptor, False
    if _native.cached_share(descriptor) > CACHED_SHARE_MIN or os.fstat(descriptor).st_size % ALIGNMENT_BYTES:
        return descriptor, False
    try:
        direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return descriptor, False
    os.close(descriptor)
    return direct, True


def _of_files(ranges: Ranges, first: int, end: int) -> tuple[Ranges, list[int]]:
    """The ranges of some of the files, and their places among all."""
    places = [place for place, file in enumerate(ranges.files) if first <= file < end]
    part = ranges.only(places)
    files = array("Q", [file - first for file in part.files])
    return Ranges(ranges.paths[first:end], files, part.sums, part.offsets, part.sizes, part.addresses), places


def _link(temporary: Path, target: Path) -> None:
    # Over NFS a link whose reply was lost is asked for again, and then finds its own work.
    _name(lambda: os.link(temporary, target), lambda: temporary.stat().st_nlink >= 2)


def _symlink(to: str, place: Path) -> None:
    # Who has just made what it leads to is the only one who makes this link: what is there is its own work.
    _name(lambda: place.symlink_to(to), lambda: str(place.readlink()) == to)


def _name(make: Callable[[], None], is_made: Callable[[], bool]) -> None:
    """Make a name that nobody may have taken. Raises `OSError` where it was not made, `_LinkUnknown` in doubt."""
    try:
        make()
    except OSError as error:
        with contextlib.suppress(OSError):
            if is_made():
                return
        if isinstance(error, FileExistsError) or error.errno in _LINK_REFUSED:
            raise
        raise _LinkUnknown(str(error)) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a directory; they promise its order by other means.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _failure(what: str, target: Path, error: OSError) -> StorageError:
    cause = os.strerror(error.errno) if error.errno else str(error)
    if isinstance(error, FileExistsError):
        return AlreadyExists(f"{target} exists already")
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{what} {target}: it is not there")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"disk full: {what} {target}: {cause}; {_free(target)} are free there; make room")
    return StorageError(f"{what} {target}: {cause}")


def _free(target: Path) -> str:
    for directory in target.parents:
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(directory).free >> 20} MiB"
    return "0 MiB"
