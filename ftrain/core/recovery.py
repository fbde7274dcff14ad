"""Which state a generation starts from: the newest one that is known to be whole."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from ftrain.core.journal import CommitBody, History
from ftrain.core.messages import Attempt, Resume


def recovery_line(history: History, suspects: AbstractSet[Attempt]) -> Resume | None:
    """The newest commit of the run, passing over those that a restore found damaged; None for the very beginning."""
    for sequence, commit in reversed(history.commits):
        if commit.attempt not in suspects:
            return resume_from(sequence, commit)
    return None


def resume_from(sequence: int, commit: CommitBody) -> Resume:
    return Resume(commit.attempt, commit.world_size, sequence, commit.manifest_sha256)


def to_retire(history: History, keep: int, suspects: AbstractSet[Attempt]) -> tuple[Attempt, ...]:
    """The commits beyond the newest `keep`. A damaged one is kept aside, and does not count as one of the kept."""
    sound = [commit.attempt for _, commit in history.commits if commit.attempt not in suspects]
    return tuple(sound[:-keep]) if keep > 0 else ()
