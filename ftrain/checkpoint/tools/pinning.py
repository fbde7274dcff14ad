"""Commits that stay, under a name, until somebody takes the name away."""

from __future__ import annotations

from ftrain.checkpoint.catalogue import Commit, problem_of, read_manifest
from ftrain.checkpoint.pins import pin, pins, unpin
from ftrain.core import journal
from ftrain.errors import CheckpointNotFound, UsageError
from ftrain.storage import Storage
from ftrain.storage.history import read_history


def keep(commit: Commit, name: str, why: str) -> bool:
    """Pin a commit in its own run; False where its files are in no run, so that nothing would remove them.

    Raises `UsageError` where the name is another pin's, and `CheckpointNotFound`, with nothing pinned, where the run
    has let go of the commit meanwhile.
    """
    attempt = read_manifest(commit).attempt
    if attempt.path != commit.path or not commit.storage.list(journal.DIRECTORY):
        return False
    before = {other for other, path in pins(commit.storage).items() if path == commit.path}
    pin(commit.storage, name, attempt, why)
    # Only now: whoever retires it from now on finds the pin.
    history, _ = read_history(commit.storage)
    stands = any(body.attempt == attempt for _, body in history.commits) or before - {name}
    if stands and not problem_of(commit):
        return True
    if name in before:  # by somebody who may not have come to look whether it stands
        raise UsageError(f"{commit.url} is pinned as {name!r} already, and its run has let go of it")
    unpin(commit.storage, name)
    raise CheckpointNotFound(f"{commit.url} has just been retired by its run; choose a newer commit")


def let_go(storage: Storage, name: str) -> str:
    """Take a pin away. Returns the path of the commit that had it. Raises `UsageError` naming those that there are."""
    there = pins(storage)
    if name not in there:
        raise UsageError(f"{storage.url} has no pin {name!r}; its pins: {', '.join(sorted(there)) or 'none'}")
    unpin(storage, name)
    return there[name]
