"""Which state a generation starts from: the newest one that is known to be whole. And what a commit does not hold."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from ftrain.core.journal import CommitBody, History
from ftrain.core.messages import Attempt, Resume
from ftrain.core.page import Phase


def recovery_line(history: History, suspects: AbstractSet[Attempt]) -> Resume | None:
    """The newest commit of the run, passing over those that a restore found damaged; None for the very beginning."""
    for sequence, commit in reversed(history.commits):
        if commit.attempt not in suspects:
            return resume_from(sequence, commit)
    return None


def standing(history: History, suspects: AbstractSet[Attempt]) -> str:
    """What the run can go on from, in words."""
    line = recovery_line(history, suspects)
    return f"the commit of step {line.attempt.step} stands" if line is not None else "nothing is committed"


def unsaved(step: int, phase: int, committed: int, joins: bool) -> bool:
    """Whether a rank that is there, or ended there, may have done what the commit of step `committed` does not hold.

    What a script did before it joined cannot be known. `joins` says that it is one that will, so that it did nothing.
    """
    return step > committed or (phase == Phase.BOOT and not joins)


def resume_from(sequence: int, commit: CommitBody) -> Resume:
    return Resume(commit.attempt, commit.world_size, sequence, commit.manifest_sha256)


def to_retire(history: History, keep: int, suspects: AbstractSet[Attempt]) -> tuple[Attempt, ...]:
    """The commits beyond the newest `keep`. A damaged one is kept aside, and does not count as one of the kept."""
    sound = [commit.attempt for _, commit in history.commits if commit.attempt not in suspects]
    return tuple(sound[:-keep]) if keep > 0 else ()
