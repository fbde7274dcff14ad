"""A new run that begins with a commit of another, whose files stay where they are. Needs no torch."""

from __future__ import annotations

import hashlib
import posixpath
import time
import uuid
from dataclasses import dataclass

from ftrain import __version__
from ftrain.checkpoint.catalogue import Commit, find, problem_of, read_manifest
from ftrain.checkpoint.tools.pinning import keep
from ftrain.checkpoint.written import read_index
from ftrain.core import journal
from ftrain.core.journal import CommitBody, Head, RunBody
from ftrain.core.manifest import MANIFEST_PATH
from ftrain.core.messages import Attempt, Origin
from ftrain.errors import (
    AlreadyExists,
    CorruptCheckpoint,
    Fenced,
    StorageError,
    UnknownOutcome,
    UsageError,
)
from ftrain.storage import Storage, open_storage
from ftrain.storage.opening import absolute

FORK_GENERATION = 0  # generations of a run count from 1: what it began with is no attempt of its own


@dataclass(frozen=True, slots=True)
class Forked:
    run: str
    step: int  # that the new run goes on from
    origin: str  # the commit's files
    pin: str  # what keeps them, "" where nothing would remove them


def fork(
    reference: str, run_dir: str, *, weights_only: bool = False, own_options: bool = False, step: int | None = None
) -> Forked:
    """Make the directory of a run that goes on from a commit: `ftrain launch --run-dir` then does.

    The commit is pinned in its own run, so that it stays there as long as the pin does. With `weights_only` the new run
    takes over the modules alone and counts from 0; with `own_options` its optimizers take over everything but their
    options. `step` is what it counts from instead. Raises `UsageError` where `run_dir` holds a run,
    `CheckpointNotFound`, and `CorruptCheckpoint` where files of the commit are missing.
    """
    commit = find(reference)
    problem = problem_of(commit)
    if problem:
        raise CorruptCheckpoint(f"{reference}: {problem}; fork another commit")
    if not weights_only:
        _check_state(commit)
    run = open_storage(absolute(run_dir))
    if run.list(journal.DIRECTORY):
        raise UsageError(f"{run.url} holds a run already; give a new directory")
    if step is None:
        step = 0 if weights_only else commit.step
    data = commit.storage.read(f"{commit.path}/{MANIFEST_PATH}")
    name = f"fork-{hashlib.sha256(run.url.encode()).hexdigest()[:12]}"
    if not keep(commit, name, f"forked as {run.url}"):
        name = ""
    origin = Origin(commit.storage.url, commit.path, weights_only, own_options)
    append(
        run,
        Head(),
        [
            RunBody(posixpath.basename(run.url), "", __version__),
            CommitBody(
                Attempt(FORK_GENERATION, step, 0),
                commit.world_size,
                journal.digest(data),
                commit.payload_bytes,
                origin,
            ),
        ],
    )
    return Forked(run.url, step, commit.url, name)


def append(run: Storage, head: Head, bodies: list[journal.Body]) -> Head:
    """Continue a journal. Returns its new head. Raises `Fenced` where somebody else has continued it."""
    writer = uuid.uuid4().hex
    for body in bodies:
        sequence = head.sequence + 1
        record = journal.Record(sequence, head.digest, f"{writer}:{sequence}", time.time(), body)
        data, path = journal.encode(record), journal.path_of(sequence)
        try:
            run.create(path, data)
        except AlreadyExists:
            if not run.confirm(path, data):
                raise Fenced(f"{run.url}/{path}: somebody else continues this run; nothing more was changed") from None
        except UnknownOutcome as error:
            if not run.confirm(path, data):
                raise StorageError(f"{run.url}/{path}: cannot be written: {error}; try again") from error
        head = Head(sequence, journal.digest(data))
    return head


def _check_state(commit: Commit) -> None:
    """A run goes on from what a run committed: with its data's positions and random numbers."""
    manifest = read_manifest(commit)
    plain = read_index(commit.storage, commit.path, manifest, manifest.packs[0]).plain
    if not {"batches", "random"} <= plain.keys():
        raise UsageError(
            f"{commit.url} was not committed by a run, so there is no data position to go on from: take its weights "
            "with --weights-only"
        )
