"""Runs many schedules, in several processes, and adds up what they came to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing import get_context

from tests.simulator import bugs
from tests.simulator.coverage import Coverage
from tests.simulator.plan import Plan, draw
from tests.simulator.world import Outcome, World, simulate

BATCH = 250


@dataclass(slots=True)
class Tally:
    """What a number of schedules came to."""

    schedules: int = 0
    events: int = 0
    commits: int = 0
    finished: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    reached: Counter[tuple[str, str]] = field(default_factory=Counter)
    violations: list[tuple[int, str]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.schedules += 1
        self.events += outcome.events
        self.commits += outcome.commits
        self.finished += outcome.finished
        self.faults += outcome.faults
        if outcome.violation:
            self.violations.append((outcome.seed, outcome.violation))

    def merge(self, other: Tally) -> None:
        self.schedules += other.schedules
        self.events += other.events
        self.commits += other.commits
        self.finished += other.finished
        self.faults += other.faults
        self.reached += other.reached
        self.violations += other.violations


def run_batch(first: int, count: int, bug: str = "", stop_at_first: bool = False) -> Tally:
    """Run the schedules `first` to `first + count - 1`, with a planted bug if one is named."""
    tally = Tally()
    with Coverage() as coverage, bugs.planted(bug) as prepare:
        for seed in range(first, first + count):
            tally.add(simulate(drawn(seed, bug), prepare=prepare))
            if stop_at_first and tally.violations:
                break
    tally.reached = coverage.reached
    return tally


def drawn(seed: int, bug: str) -> Plan:
    """The schedule of this seed, with one fault aimed to where the bug would show."""
    plan = draw(seed)
    if bug not in bugs.AIMS:
        return plan
    act, kind = bugs.AIMS[bug]
    return replace(plan, aimed={(act, 1 + seed % 4): kind})


def _batch(job: tuple[int, int, str]) -> Tally:
    return run_batch(*job)


def run_many(first: int, count: int, bug: str, workers: int, progress: Callable[[Tally], None]) -> Tally:
    jobs = [(seed, min(BATCH, first + count - seed), bug) for seed in range(first, first + count, BATCH)]
    total = Tally()
    with get_context("spawn").Pool(workers) as pool:
        for tally in pool.imap_unordered(_batch, jobs):
            total.merge(tally)
            progress(total)
    return total


def trace(seed: int, bug: str) -> Outcome:
    with bugs.planted(bug) as prepare:
        return World(drawn(seed, bug), tracing=True, prepare=prepare).run()
