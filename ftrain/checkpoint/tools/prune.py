"""Removal of a run's commits by rule, when nobody runs it. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ftrain.checkpoint.catalogue import Catalogue, Commit, problem_of
from ftrain.checkpoint.retain import CHECKPOINTS, pinned_paths
from ftrain.checkpoint.tools.fork import append
from ftrain.core import journal
from ftrain.core.journal import RetireBody
from ftrain.core.retention import RetentionPolicy, to_retire
from ftrain.errors import UsageError
from ftrain.storage.history import make_durable, read_history


@dataclass(frozen=True, slots=True)
class Plan:
    keep: tuple[tuple[Commit, str], ...]  # with the reason
    remove: tuple[Commit, ...]


def plan(found: Catalogue, rules: RetentionPolicy, steps: Collection[int] = ()) -> Plan:
    """What would be removed: neither what the rules keep, nor the commits of `steps`, nor what is pinned or damaged.

    Raises `UsageError` for a step that is not there, and where this is no run.
    """
    _, history = found.run
    there = {commit.step for commit in found.commits}
    for step in steps:
        if step not in there:
            raise UsageError(f"--keep-step {step}: {found.place} has no commit of this step; nothing was removed")
    damaged = {commit.attempt for commit in found.commits if problem_of(commit)}
    doomed = set(to_retire(history, rules, damaged))
    keep, gone = [], []
    for commit in found.commits:
        if commit.pins:
            keep.append((commit, f"pinned as {', '.join(commit.pins)}"))
        elif commit.attempt in damaged:
            keep.append((commit, "damaged: it is kept aside"))
        elif commit.attempt not in doomed:
            keep.append((commit, "by the rules"))
        elif commit.step in steps:
            keep.append((commit, "by its step"))
        else:
            gone.append(commit)
    return Plan(tuple(keep), tuple(gone))


def prune(found: Catalogue, doomed: Sequence[Commit]) -> list[str]:
    """Retire commits in the run's journal, and remove their files, and those of commits that were retired before.

    Nobody may run it meanwhile; if somebody does all the same, this or that one is fenced, and nothing is lost. Returns
    the paths of what was removed. Raises `UsageError` where this is no run, `Fenced`, and `StorageError`.
    """
    storage, history = found.run
    make_durable(storage, history, storage.read(journal.path_of(history.head.sequence)))
    append(storage, history.head, [RetireBody(commit.attempt) for commit in doomed])
    now, _ = read_history(storage)
    kept = pinned_paths(storage) | {attempt.path for attempt in now.needed}
    retired = {former.commit.attempt.path for former in history.retired} | {commit.attempt.path for commit in doomed}
    there = {
        f"{CHECKPOINTS}/{step}/{name}"
        for step in storage.list(CHECKPOINTS)
        for name in storage.list(f"{CHECKPOINTS}/{step}")
    }
    removed = sorted((retired & there) - kept)
    for path in removed:
        storage.remove_tree(path)
    return removed
