"""Which state a generation starts from: the newest one that is known to be whole. And what a commit does not hold."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ftrain.core.journal import CommitBody, History
from ftrain.core.messages import Attempt, Line, Resume, Tier
from ftrain.core.page import Phase


@dataclass(frozen=True, slots=True)
class Holder:
    """What is left of one rank. `shard` is equal for ranks that are replicas of each other, "" where that is not known.

    A rank that is gone has no `live` step; `kept` are the boundaries whose private state outlived its process.
    """

    rank: int
    shard: str = ""
    live: int = -1
    kept: tuple[int, ...] = ()
    replays: bool = False


def plan(ranks: Sequence[Holder], held: Collection[Attempt], resume: Resume | None) -> Line | None:
    """The newest line that every rank can be brought to, and how; None where there is none but the very beginning.

    `held` are snapshots that every rank's node has, `resume` is the newest commit. Of two sources of one step the
    nearer one is taken.
    """
    steps = sorted({holder.live for holder in ranks if holder.live > 0}, reverse=True)
    live = next((line for step in steps if (line := _live(ranks, step)) is not None), None)
    newest = max(held, default=None, key=lambda attempt: (attempt.step, attempt))
    arena = Line(newest.step, Tier.ARENA, newest) if newest is not None else None
    storage = Line(resume.attempt.step, Tier.STORAGE) if resume is not None else None
    return max((line for line in (live, arena, storage) if line is not None), default=None, key=lambda line: line.step)


def _live(ranks: Sequence[Holder], step: int) -> Line | None:
    """The line of `step` from the tensors of living ranks, if there is a holder for each rank's shard.

    A rank's private state is there as it was at the line, or at the step before: then the rank does that step again
    by itself, and takes the shared state from a replica afterwards.
    """
    sources: dict[str, list[int]] = {}
    for holder in ranks:
        if holder.live == step:
            sources.setdefault(holder.shard, []).append(holder.rank)
    copies: list[tuple[int, int]] = []
    replay: list[int] = []
    for holder in ranks:
        if not holder.shard or holder.shard not in sources:
            return None
        if step not in holder.kept:
            if step - 1 not in holder.kept or not holder.replays or holder.live == step:
                return None
            replay.append(holder.rank)
        if holder.live != step:
            found = sources[holder.shard]
            copies.append((found[len(copies) % len(found)], holder.rank))
    return Line(step, Tier.LIVE, None, tuple(copies), tuple(replay))


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
    return Resume(commit.attempt, commit.world_size, sequence, commit.manifest_sha256, commit.origin)
