"""A run's directory whose packs lie on several disks, so that its ranks write to all of them at once.

    RUN/checkpoints/step-…/g0001-a1/packs/00001/c/0 ──link──► DISK/checkpoints/step-…/g0001-a1/packs/00001/c/0

A pack that is not in the run's directory is a link there, so that the directory tells all: to people, to zarr, and to
ftrain, which follows it to disks that are proved to be the run's (`disks`), and nowhere else. The pack is durable
before its link is made, and the link before the rank is prepared. Directories of attempts are listed and removed on all
disks, so whatever a crash leaves on one of them is found by who sweeps.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from ftrain._native import Pack
from ftrain.errors import AlreadyExists, NotFound, StorageError, UsageError
from ftrain.storage.base import Effort
from ftrain.storage.disks import DIRECTORY, Disk, known_disks, take
from ftrain.storage.pack import Stream
from ftrain.storage.posix import PosixStorage

log = logging.getLogger("ftrain")
_SPREAD = "checkpoints"  # what of a run is on its disks, too
_PACK = re.compile(r"checkpoints/step-\d+/g\d+-a\d+/packs/(\d+)/c/0")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def has_disks(directory: str) -> bool:
    """Whether what is in a directory may be on other disks as well."""
    return Path(directory, DIRECTORY).is_dir()


class SpreadStorage(PosixStorage):
    """`Storage` of a run. New packs go to its directory and to `disks`, absolute paths, in turn by their rank."""

    def __init__(self, root: str | Path, disks: Sequence[str] = ()) -> None:
        super().__init__(root)
        self._turns = tuple(disks)
        self._known: dict[str, Disk] = {}  # by directory; each with the one storage that has its doubts
        self._proved: set[str] = set()  # tokens of disks that may be read
        self._told: set[str] = set()  # tokens of disks that were said to be gone
        self._looking = threading.Lock()

    def check(self) -> None:
        super().check()
        if self._turns:
            self._check_links()
            take(self, self._turns)

    def _check_links(self) -> None:
        probe = self._path(f".ftrain-probe-{uuid.uuid4().hex}")
        try:
            probe.symlink_to("nowhere")
        except OSError as error:
            if error.errno not in _FULL:
                raise UsageError(
                    f"--disks: {self.url} cannot have links to packs on other disks: {error.strerror}; keep the run in "
                    "one directory, on a file system with symbolic links"
                ) from None
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def confirm(self, path: str, data: bytes) -> bool:
        disk = self._holder(path)
        if disk is None:
            return super().confirm(path, data)
        self._refuse_doubtful(path)
        return disk.storage.confirm(path, data) and self._make_durable(path, self._path(path))

    def write_pack(
        self, path: str, pack: Pack, effort: Effort, *, should_stop: Callable[[], bool]
    ) -> tuple[list[int], list[int]]:
        disk = self._taker(path)
        if disk is None:
            return super().write_pack(path, pack, effort, should_stop=should_stop)
        sums = disk.storage.write_pack(path, pack, effort, should_stop=should_stop)
        self._refer(path, f"{disk.directory}/{path}")
        return sums

    def write_stream(self, path: str, stream: Stream, effort: Effort, *, should_stop: Callable[[], bool]) -> None:
        disk = self._taker(path)
        if disk is None:
            super().write_stream(path, stream, effort, should_stop=should_stop)
            return
        disk.storage.write_stream(path, stream, effort, should_stop=should_stop)
        self._refer(path, f"{disk.directory}/{path}")

    def size(self, path: str) -> int:
        disk = self._holder(path)
        return super().size(path) if disk is None else disk.storage.size(path)

    def exists(self, path: str) -> bool:
        try:
            disk = self._holder(path)
        except NotFound:
            return False
        return super().exists(path) if disk is None else disk.storage.exists(path)

    def list(self, prefix: str) -> list[str]:
        names = super().list(prefix)
        if not _is_spread(prefix):
            return names
        return sorted({*names, *(name for disk in self._own() for name in disk.storage.list(prefix))})

    def remove_tree(self, path: str) -> None:
        super().remove_tree(path)  # with the manifest in it: what is left on a disk then is garbage to everybody
        if _is_spread(path):
            for disk in self._own():
                disk.storage.remove_tree(path)

    def _within(self, path: str) -> Path:
        disk = self._holder(path)
        return super()._within(path) if disk is None else disk.storage._within(path)

    def _refuse_doubtful(self, path: str) -> None:
        super()._refuse_doubtful(path)
        disk = self._holder(path)
        if disk is not None:
            disk.storage._refuse_doubtful(path)

    def _turn(self, path: str) -> str:
        """The disk that a new pack goes to, empty for the run's directory."""
        match = _PACK.fullmatch(path)
        return ("", *self._turns)[int(match[1]) % (1 + len(self._turns))] if match else ""

    def _taker(self, path: str) -> Disk | None:
        """The disk that a new pack goes to, proved; None for the run's directory. Raises where the pack may not."""
        directory = self._turn(path)
        if not directory:
            return None
        disk = self._disk(directory)
        if disk is None:
            raise StorageError(f"cannot write to {directory}: {self.url}/{DIRECTORY} has no record of this disk")
        disk.prove_own(self.url)  # if it is not mounted any more, the pack would go to the disk below
        if os.path.lexists(self._path(path)):
            raise AlreadyExists(f"{self._path(path)} exists already")
        return disk

    def _holder(self, path: str) -> Disk | None:
        """The disk that a pack is on, proved; None where it is in the run's directory, or a link that is not ours."""
        if not _PACK.fullmatch(path):
            return None
        try:
            to = str(self._path(path).readlink())
        except OSError:
            return None
        disk = self._disk(to.removesuffix(f"/{path}")) if to.endswith(f"/{path}") else None
        if disk is not None and disk.token not in self._proved:
            try:
                disk.prove()
            except StorageError as error:
                raise type(error)(f"cannot read {self._path(path)}: {error}") from None
            self._proved.add(disk.token)
        return disk

    def _disk(self, directory: str) -> Disk | None:
        if directory not in self._known:
            self._look()
        return self._known.get(directory)

    def _look(self) -> Sequence[Disk]:
        """All disks: another node, or somebody who continued the run, may have brought one since."""
        with self._looking:
            self._known = {disk.directory: disk for disk in known_disks(self, tuple(self._known.values()))}
            return tuple(self._known.values())

    def _own(self) -> Sequence[Disk]:
        """The disks that are there, and whose packs are this run's to remove. What is gone cannot be cleared now."""
        found = []
        for disk in self._look():
            try:
                disk.prove_own(self.url)
            except StorageError as error:
                if disk.token not in self._told:
                    log.warning("packs that nobody needs may stay on %s for now: %s", disk.directory, error)
                    self._told.add(disk.token)
            else:
                self._told.discard(disk.token)
                found.append(disk)
        return found


def _is_spread(path: str) -> bool:
    return path.split("/", 1)[0] == _SPREAD
