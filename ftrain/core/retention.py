"""Which commits stay: the newest, one every so often, and the best by a metric that the run logged.

Everything that this goes by is in the journal, so that a coordinator that comes back decides as the one before would
have. A commit that one of the rules keeps is kept by it from then on, or until a better one takes its place: what has
been retired meanwhile would not have been kept by it either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ftrain.core.journal import CommitBody, History
from ftrain.core.messages import Attempt, Logged


@dataclass(frozen=True, slots=True)
class Best:
    """Keep the `count` commits with the smallest value of a metric, or the `largest`."""

    count: int
    metric: str
    largest: bool = False


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """A commit stays as long as any of these keeps it; 0 and () keep none. `last` is at least 1."""

    last: int = 2
    every_steps: int = 0  # the first commit at or after each multiple of this
    every_seconds: float = 0.0  # the first commit, and the next one this long after the last one kept
    best: tuple[Best, ...] = ()


def to_retire(history: History, policy: RetentionPolicy, suspects: AbstractSet[Attempt]) -> tuple[Attempt, ...]:
    """The commits that nothing keeps, oldest first.

    A damaged one is kept aside, and does not count as one of the kept.
    """
    sound = [(sequence, commit) for sequence, commit in history.commits if commit.attempt not in suspects]
    kept = {sequence for sequence, _ in sound[-policy.last :]}
    if policy.every_steps:
        kept.update(_by_steps(sound, policy.every_steps))
    if policy.every_seconds:
        kept.update(_by_time(((sequence, history.times[sequence]) for sequence, _ in sound), policy.every_seconds))
    for best in policy.best:
        kept.update(_best(sound, best))
    return tuple(commit.attempt for sequence, commit in sound if sequence not in kept)


def _by_steps(commits: Iterable[tuple[int, CommitBody]], every: int) -> Iterator[int]:
    before = 0  # of the multiples, the one that a commit has been kept for
    for sequence, commit in commits:
        passed = commit.attempt.step // every
        if passed != before:  # less, too: the run has gone back
            yield sequence
        before = passed


def _by_time(commits: Iterable[tuple[int, float]], every_seconds: float) -> Iterator[int]:
    before = -math.inf
    for sequence, unix_seconds in commits:
        if abs(unix_seconds - before) >= every_seconds:  # or so much earlier: somebody has set the clock
            yield sequence
            before = unix_seconds


def _best(commits: Sequence[tuple[int, CommitBody]], best: Best) -> list[int]:
    """The first commit after a value was logged counts for it: those that follow repeat it, and are of later steps."""
    found: list[tuple[float, int]] = []
    seen: set[Logged] = set()
    for sequence, commit in commits:
        logged = commit.metrics.get(best.metric)
        if logged is None or logged in seen:
            continue
        seen.add(logged)
        value = float(logged.value)
        if not math.isnan(value):
            found.append((-value if best.largest else value, sequence))
    return [sequence for _, sequence in sorted(found)[: best.count]]
