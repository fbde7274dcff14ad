"""Which checkpoints are there: of a run, in a directory of saved ones, or the one at a path. Needs no torch."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from ftrain.checkpoint.pins import KEPT, is_pin_name, pins
from ftrain.checkpoint.written import is_gone
from ftrain.core import journal
from ftrain.core.journal import CommitBody, History
from ftrain.core.manifest import MANIFEST_PATH, Manifest, data_path, decode_manifest
from ftrain.core.messages import Attempt
from ftrain.errors import CheckpointNotFound, CorruptCheckpoint, NotFound, StorageError, UsageError
from ftrain.storage import Storage, open_storage
from ftrain.storage.history import read_history
from ftrain.storage.opening import absolute, split_attempt

METRICS_PATH = "metrics.jsonl"
_NAMED_MAX = 8  # steps in one error


@dataclass(frozen=True, slots=True)
class Commit:
    """A committed checkpoint, and where its files are."""

    storage: Storage
    path: str  # of its directory, below the storage's root
    attempt: Attempt
    world_size: int
    payload_bytes: int  # of all tensors
    manifest_sha256: str | None = None  # as the journal has it; None where no journal vouches for it
    sequence: int = 0  # in the journal
    unix_seconds: float | None = None  # when it was committed, where that is known
    pins: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)  # that the run had logged by then
    origin: str = ""  # the run that wrote it, where this one was forked off it

    @property
    def step(self) -> int:
        return self.attempt.step

    @property
    def url(self) -> str:
        return f"{self.storage.url}/{self.path}"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What is at a place, oldest first: a run's commits, with those that only a pin keeps."""

    place: str
    commits: tuple[Commit, ...]
    history: History | None = None  # None where it is no run
    storage: Storage | None = None  # the run's
    kept: tuple[Commit, ...] = ()  # what `ftrain.save(run, ..., keep=NAME)` left beside the commits

    @property
    def run(self) -> tuple[Storage, History]:
        """Raises `UsageError` where this is no run."""
        if self.history is None or self.storage is None:
            raise UsageError(f"{self.place} is no run directory: it has no journal")
        return self.storage, self.history


def catalogue(place: str) -> Catalogue:
    """All checkpoints at a place: a run's directory, a directory of saved ones, or one.

    Raises `CheckpointNotFound` where there is none of these, and `CorruptCheckpoint` for a damaged journal.
    """
    url = absolute(place)
    storage = open_storage(url)
    if storage.exists(MANIFEST_PATH):
        return Catalogue(url, (_at(url),))
    if storage.list(journal.DIRECTORY):
        return _run(url, storage)
    saved = [name for name in storage.list("") if _is_saved(storage, name)]
    if not saved:
        raise CheckpointNotFound(
            f"{url} is neither a run, nor a checkpoint, nor a directory of checkpoints: it has no journal and no "
            f"{MANIFEST_PATH}"
        )
    commits = [_saved(storage, name) for name in saved]
    return Catalogue(url, tuple(sorted(commits, key=lambda commit: (commit.step, commit.path))))


def find(reference: str) -> Commit:
    """The one checkpoint that is meant by `RUN`, `RUN@latest`, `RUN@STEP`, `RUN@-2`, `RUN@PIN`, or a path to it.

    Raises `CheckpointNotFound` naming those that are there.
    """
    place, _, which = reference.rpartition("@")
    if not place or "/" in which or open_storage(absolute(reference)).exists(""):
        place, which = reference, "latest"
    found = catalogue(place)
    if not found.commits:
        raise CheckpointNotFound(f"{found.place} is a run without a commit")
    return _select(found, which)


def read_manifest(commit: Commit) -> Manifest:
    """Proved against the journal where there is one. Raises `CorruptCheckpoint`."""
    path = f"{commit.path}/{MANIFEST_PATH}"
    try:
        data = commit.storage.read(path)
    except NotFound:
        raise CorruptCheckpoint(f"{commit.url}: the manifest is gone") from None
    if commit.manifest_sha256 is not None and journal.digest(data) != commit.manifest_sha256:
        raise CorruptCheckpoint(f"{commit.url}/{MANIFEST_PATH}: the manifest is not the one that was committed")
    return decode_manifest(data, f"{commit.url}/{MANIFEST_PATH}")


def problem_of(commit: Commit) -> str:
    """What a quick look finds wrong: files that are gone or have another size. Empty for a whole one.

    Contents are not read: that is what `verify` does.
    """
    try:
        manifest = read_manifest(commit)
        for pack in manifest.packs:
            if not commit.storage.exists(f"{commit.path}/{pack.index_path}"):
                return f"the pack index of rank {pack.rank} is gone"
            size = commit.storage.size(f"{commit.path}/{data_path(pack.path)}")
            if size != pack.file_bytes:
                return f"the pack of rank {pack.rank} has {size} bytes instead of {pack.file_bytes}"
            for attempt in pack.refers:
                if is_gone(commit.storage, commit.path, manifest.attempt, attempt, pack.rank):
                    return f"the pack of rank {pack.rank} of {attempt}, to which this one refers, is gone"
    except NotFound:
        return f"the pack of rank {pack.rank} is gone"
    except CorruptCheckpoint as error:
        return str(error)
    return ""


def metrics_by_step(storage: Storage) -> list[tuple[int, dict[str, float]]]:
    """What a run logged: (the number of the step, values by name), in the order of steps; of a step done again the
    last. Lines that cannot be read are passed over: the file is for people, and its last line may be cut short.
    """
    try:
        lines = storage.read(METRICS_PATH).splitlines()
    except StorageError:
        return []
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        try:
            values = msgspec.json.decode(line, type=dict[str, float | str])
            step = int(values["step"])
            named = {
                name: float(value)
                for name, value in values.items()
                if name not in ("unix_seconds", "generation", "step")
            }
        except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, ValueError, OverflowError):
            continue
        found[step] = {**found.get(step, {}), **named}
    return sorted(found.items())


def _run(url: str, storage: Storage) -> Catalogue:
    history, _ = read_history(storage)
    names = pins(storage)
    paths = set(names.values())
    there = [journal.Committed(sequence, history.times[sequence], body) for sequence, body in history.commits]
    there += [former for former in history.retired if former.commit.attempt.path in paths]
    commits = tuple(
        replace(_committed(storage, body), sequence=sequence, unix_seconds=seconds)
        for sequence, seconds, body in sorted(there, key=operator.itemgetter(0))
    )
    named = tuple(
        replace(commit, pins=tuple(sorted(name for name, path in names.items() if path == commit.attempt.path)))
        for commit in commits
    )
    kept = [_saved(storage, f"{KEPT}/{name}") for name in storage.list(KEPT) if _is_saved(storage, f"{KEPT}/{name}")]
    return Catalogue(url, named, history, storage, tuple(kept))


def _committed(storage: Storage, body: CommitBody) -> Commit:
    origin = body.origin
    if origin is None:
        where, path = storage, body.attempt.path
    else:
        where, path = open_storage(origin.url), origin.path
    return Commit(
        where,
        path,
        body.attempt,
        body.world_size,
        body.payload_bytes,
        body.manifest_sha256,
        metrics={name: float(logged.value) for name, logged in body.metrics.items()},
        origin=origin.url if origin is not None else "",
    )


def _is_saved(storage: Storage, path: str) -> bool:
    return storage.exists(f"{path}/{MANIFEST_PATH}")


def _saved(storage: Storage, name: str) -> Commit:
    where = f"{name}/{MANIFEST_PATH}"
    manifest = decode_manifest(storage.read(where), f"{storage.url}/{where}")
    payload = sum(pack.payload_bytes for pack in manifest.packs)
    names = (name.removeprefix(f"{KEPT}/"),) if name.startswith(f"{KEPT}/") else ()
    return Commit(storage, name, manifest.attempt, manifest.world_size, payload, pins=names)


def _at(url: str) -> Commit:
    """The checkpoint at a path. One in a run's directory is what the run's journal says of it."""
    root, path = split_attempt(url)
    if root:
        storage = open_storage(root)
        if storage.list(journal.DIRECTORY):
            for commit in _run(root, storage).commits:
                if commit.path == path and not commit.origin:
                    return commit
            raise CheckpointNotFound(f"{url} is in a run whose journal has no commit of it: it may be removed any time")
    parent, _, name = url.rpartition("/")
    return _saved(open_storage(parent or "/"), name)


def _select(found: Catalogue, which: str) -> Commit:
    commits = found.commits
    if which in ("latest", "newest"):
        return commits[-1]
    named = [commit for commit in commits if which in commit.pins]
    kept, run = f"{KEPT}/{which}", found.storage
    if not named and run is not None and is_pin_name(which) and run.exists(f"{kept}/{MANIFEST_PATH}"):
        named = [_saved(run, kept)]
    if not named and re.fullmatch(r"-?\d{1,18}", which):
        number = int(which)
        if number < 0:
            named = list(commits[number:][:1]) if -number <= len(commits) else []
        else:
            named = [commit for commit in commits if commit.step == number]
    if not named:
        former = found.history.retired if found.history is not None else ()
        retired = any(str(one.commit.attempt.step) == which for one in former)
        gone = "; that one was retired, which --keep decides" if retired else ""
        raise CheckpointNotFound(f"{found.place} has no commit {which}: it has {_steps(commits)}{gone}")
    return named[-1]


def _steps(commits: Sequence[Commit]) -> str:
    steps = [str(commit.step) for commit in commits]
    more = f"{len(steps) - _NAMED_MAX} older and " if len(steps) > _NAMED_MAX else ""
    return f"those of {more}step {', '.join(steps[-_NAMED_MAX:])}"
