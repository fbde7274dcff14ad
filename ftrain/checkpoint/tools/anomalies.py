"""What looks sick along a run: tensors of its commits, one after the other, and the metrics of its steps in between."""

from __future__ import annotations

import math
import statistics as middle
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ftrain.checkpoint.catalogue import Commit
from ftrain.checkpoint.tools.opening import Everything, matching, open_commit
from ftrain.checkpoint.tools.statistics import Statistics, statistics
from ftrain.errors import CorruptCheckpoint

GROWTH = 10.0  # of a norm from one commit to the next, that is no training where values are large, too
GROWTH_ANY = 100.0
SPIKE = 5.0  # times the median of a metric before
SPIKE_BEFORE = 10  # values that a median needs
SPIKE_WINDOW = 50
FLOAT16_NEAR = 0.5  # of the largest number that there is
_FLOAT16_MAX = 65504.0
SICK = ("nan", "inf", "damaged")  # what nobody trains on from; the others may have a reason


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One thing that was found."""

    step: int  # of a commit: finished steps; of a metric: the step's number
    kind: str  # nan, inf, grew, vanished, near float16's limit, spike, damaged
    where: str  # a tensor's key, or "metric NAME"
    what: str
    since: bool = False  # it was the same in the commit before

    @property
    def is_sick(self) -> bool:
        return self.kind in SICK


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of one commit."""

    commit: Commit
    anomalies: tuple[Anomaly, ...]

    @property
    def is_clean(self) -> bool:
        """Training can go on from it, as far as numbers tell."""
        return not any(one.is_sick for one in self.anomalies)


def look_along(
    commits: Sequence[Commit], only: Sequence[str] | None, on_commit: Callable[[Commit], None] = lambda _: None
) -> Iterator[Look]:
    """Each commit, compared with the one before it. Reads all of their tensors; a damaged one is said to be so."""
    before: dict[str, Statistics] = {}
    for commit in commits:
        on_commit(commit)
        try:
            source = Everything(open_commit(commit))
            keys = matching(source.tensors, only)
            now = statistics(source, keys)
        except CorruptCheckpoint as error:
            yield Look(commit, (Anomaly(commit.step, "damaged", commit.path, str(error)),))
            continue
        found: list[Anomaly] = []
        for key in keys:
            found += _of_tensor(commit.step, key, source.tensors[key].dtype, now[key], before.get(key))
        yield Look(commit, tuple(found))
        before = now


def look_at_metrics(metrics: Sequence[tuple[int, Mapping[str, float]]]) -> list[Anomaly]:
    """Metrics that are not finite, each the first time in a row, and spikes: far above the median of those before."""
    found: list[Anomaly] = []
    recent: dict[str, deque[float]] = {}
    sick: set[str] = set()
    for step, values in metrics:
        for name, value in values.items():
            past = recent.setdefault(name, deque(maxlen=SPIKE_WINDOW))
            if not math.isfinite(value):
                if name not in sick:
                    sick.add(name)
                    was = f"{past[-1]:.4g} before" if past else "from the first"
                    kind = "nan" if math.isnan(value) else "inf"
                    found.append(Anomaly(step, kind, f"metric {name}", was))
                continue
            sick.discard(name)
            usual = middle.median(past) if len(past) >= SPIKE_BEFORE else math.inf
            if usual > 0 and value > SPIKE * usual:
                found.append(Anomaly(step, "spike", f"metric {name}", f"{value:.4g}, usually {usual:.4g}"))
            past.append(value)
    return found


def _of_tensor(step: int, key: str, dtype: str, now: Statistics, before: Statistics | None) -> Iterator[Anomaly]:
    for kind, count, earlier in (
        ("nan", now.nans, before.nans if before else 0),
        ("inf", now.infs, before.infs if before else 0),
    ):
        if count:
            share = "all" if count == now.elements else f"{count:,} of"
            yield Anomaly(step, kind, key, f"{share} {now.elements:,} elements", since=earlier == count)
    if dtype == "float16" and now.max_abs > FLOAT16_NEAR * _FLOAT16_MAX:
        yield Anomaly(step, "near float16's limit", key, f"largest {now.max_abs:.4g} of {_FLOAT16_MAX:.0f}")
    if before is None or not before.squares:
        return
    large = now.norm > math.sqrt(now.elements)
    if now.norm > (GROWTH if large else GROWTH_ANY) * before.norm and not _counts(dtype):
        what = f"norm {before.norm:.4g} → {now.norm:.4g} ({now.norm / before.norm:.0f} times)"
        yield Anomaly(step, "grew", key, what)
    if not now.squares and now.is_finite:
        yield Anomaly(step, "vanished", key, f"norm {before.norm:.4g} → 0")


def _counts(dtype: str) -> bool:
    """Whole numbers count things, and are to grow."""
    return dtype.startswith(("int", "uint", "bool"))
