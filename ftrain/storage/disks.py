"""The disks over which a run spreads its packs, and what proves that a directory is one of them.

    RUN/disks/<token>.json    {"directory": "/nvme1/run"}              the run's word for the disk
    DISK/ftrain-disk.json     {"token": …, "run": "/shared/run"}       the disk's word for the run

Either alone proves nothing: a run may be a stranger's, and name what is not his; a disk may not be mounted, and another
directory be in its place. Both are made once, durably, and never changed.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from ftrain.errors import CorruptCheckpoint, NotFound, StorageError, UsageError
from ftrain.storage.base import create_once
from ftrain.storage.files import read_file
from ftrain.storage.posix import PosixStorage

DIRECTORY = "disks"
MARK_NAME = "ftrain-disk.json"
FILE_BYTES_MAX = 16 << 10  # of either of the two
DISKS_MAX = 256  # that one run may have had
_RECORD_NAME = re.compile(r"([0-9a-f]{32})\.json")
_File = TypeVar("_File", "Record", "Mark")
_NOT_OURS = frozenset(("lost+found",))  # what a file system has in it when it is new

Token = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Directory = Annotated[str, msgspec.Meta(pattern="^/[^\x00]*[^\x00/]$", max_length=4096)]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """In the run's directory, under the disk's token."""

    directory: Directory


class Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """In the disk's directory."""

    token: Token
    run: Directory  # whose packs it takes


@dataclass(frozen=True, slots=True)
class Disk:
    """A directory that a run knows by its token. What it holds has the same paths as in the run's directory."""

    token: str
    directory: str
    storage: PosixStorage

    def prove(self) -> Mark:
        """That it is there, and the one that the run means.

        Raises `NotFound` where it is gone, `CorruptCheckpoint` where another is in its place, and `StorageError`.
        """
        mark = read_mark(self.directory)
        if mark is None:
            raise NotFound(f"{self.directory}, a disk of this run, is gone: there is no {MARK_NAME}; is it mounted?")
        if mark.token != self.token:
            raise CorruptCheckpoint(
                f"{self.directory} is not the disk that this run means: its {MARK_NAME} has another token; mount the "
                "right one there"
            )
        return mark

    def prove_own(self, run: str) -> None:
        """As `prove`; and that its packs are those of the run at `run`, not of one that this is a copy of."""
        mark = self.prove()
        if mark.run != os.path.realpath(run):
            raise StorageError(
                f"{self.directory} is a disk of the run at {mark.run}, which {run} may read but not change; if that "
                f'run was moved to {run}, correct "run" in {self.directory}/{MARK_NAME}'
            )


def known_disks(run: PosixStorage, known: Sequence[Disk] = ()) -> list[Disk]:
    """The disks that the run has a record of; those in `known` are not read again. Raises `CorruptCheckpoint`."""
    found = {disk.token: disk for disk in known}
    names = [match[1] for match in map(_RECORD_NAME.fullmatch, run.list(DIRECTORY)) if match]
    if len(names) > DISKS_MAX:
        raise CorruptCheckpoint(f"{run.url}/{DIRECTORY}: {len(names)} disks are more than {DISKS_MAX}")
    for token in names:
        if token not in found:
            path = f"{DIRECTORY}/{token}.json"
            directory = _recorded(run, path).directory
            found[token] = Disk(token, directory, PosixStorage(directory))
    return list(found.values())


def take(run: PosixStorage, directories: Sequence[str]) -> None:
    """Make the directories, absolute paths, disks of the run, durably, as far as they are not yet.

    Raises `UsageError`, saying what to do, where one of them cannot be, and `StorageError`.
    """
    for one, other in combinations((run.url, *directories), 2):
        first, second = os.path.realpath(one), os.path.realpath(other)
        shared = os.path.commonpath((first, second))
        if shared in (first, second):
            inner, outer = (other, one) if shared == first else (one, other)
            how = "is the same as" if first == second else "is in"
            raise UsageError(
                f"--disks: {inner} {how} {outer}; give directories that are apart from the run's and from each other"
            )
    taken: dict[str, str] = {}
    for directory in directories:
        token = _take(run, directory)
        if token in taken:
            raise UsageError(f"--disks: {directory} and {taken[token]} are the same directory; name it once")
        taken[token] = directory


def _take(run: PosixStorage, directory: str) -> str:
    """Returns the disk's token."""
    storage, own = PosixStorage(directory), os.path.realpath(run.url)
    mark = read_mark(directory)
    if mark is None:
        for disk in known_disks(run):
            if disk.directory == directory:
                raise UsageError(
                    f"--disks: {directory}, a disk of this run, is gone: there is no {MARK_NAME}; mount it, or leave "
                    f"it out; if it was lost, remove {run.url}/{DIRECTORY}/{disk.token}.json: then it is taken as new"
                )
        _check_empty(directory)
        storage.check()
        create_once(storage, MARK_NAME, encoded(Mark(secrets.token_hex(16), own)))  # of several nodes, one is first
        mark = read_mark(directory)
    else:
        storage.check()
    if mark is None:
        raise UsageError(f"--disks: {directory}: what is written there is not to be seen; is it a disk?")
    storage.confirm(MARK_NAME, encoded(mark))  # another node may only just have made it
    if mark.run != own:
        raise UsageError(
            f"--disks: {directory} is a disk of the run at {mark.run}; give each run directories of its own (if that "
            f'run was moved to {own}, correct "run" in {directory}/{MARK_NAME})'
        )
    path = f"{DIRECTORY}/{mark.token}.json"
    if not create_once(run, path, encoded(Record(directory))):
        before = _recorded(run, path).directory
        raise UsageError(
            f"--disks: {directory} is the disk that this run knows at {before}; mount it there, and name it so"
        )
    return mark.token


def read_mark(directory: str) -> Mark | None:
    """What a directory says of itself as a disk, None where it says nothing. Raises `CorruptCheckpoint`."""
    path = f"{directory}/{MARK_NAME}"
    try:
        # Through no link: what is below a stranger's path is not known.
        return _decoded(read_file(path, FILE_BYTES_MAX, os.O_NOFOLLOW), Mark, path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def encoded(file: Record | Mark) -> bytes:
    return msgspec.json.encode(file) + b"\n"


def _recorded(run: PosixStorage, path: str) -> Record:
    if run.size(path) > FILE_BYTES_MAX:
        raise CorruptCheckpoint(f"{run.url}/{path}: not a record of a disk: over the limit of {FILE_BYTES_MAX} bytes")
    return _decoded(run.read(path), Record, f"{run.url}/{path}")


def _decoded(data: bytes, kind: type[_File], path: str) -> _File:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptCheckpoint(f"{path}: does not say what a disk's file says: {error}") from None


def _check_empty(directory: str) -> None:
    """Make it if need be. Raises `UsageError` where it has something in it: its names might be those of packs."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        names = [name for name in os.listdir(directory) if name not in _NOT_OURS and not name.startswith(".")]
    except OSError as error:
        raise UsageError(
            f"--disks: {directory} cannot be used: {error.strerror}; give a directory that can be written to"
        ) from None
    if names and MARK_NAME not in names:
        raise UsageError(
            f"--disks: {directory} is not empty ({sorted(names)[0]}); give a directory for this run alone, such as "
            f"{directory}/NAME"
        )
