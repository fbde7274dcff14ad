"""`python -m tests.simulator --schedules N --seed S`: run many schedules; `--trace SEED`: read one of them."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context

from ftrain.core import commit
from tests.simulator import bugs
from tests.simulator.coverage import Coverage
from tests.simulator.plan import draw
from tests.simulator.world import Outcome, World, simulate

BATCH = 250
SHOWN = 20  # violations that are printed


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
            tally.add(simulate(draw(seed), prepare=prepare))
            if stop_at_first and tally.violations:
                break
    tally.reached = coverage.reached
    return tally


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
        return World(draw(seed), tracing=True, prepare=prepare).run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--bug", default="", choices=["", *bugs.BUGS], help="plant this one")
    parser.add_argument("--trace", type=int, metavar="SEED", help="print what happens in one schedule")
    options = parser.parse_args()
    if options.trace is not None:
        outcome = trace(options.trace, options.bug)
        print("\n".join(outcome.lines))
        print(f"{outcome.events} events, {outcome.seconds:.1f} virtual seconds, trace {outcome.trace_sha256}")
        print(outcome.violation or "no violation")
        return int(bool(outcome.violation))
    began = time.perf_counter()

    def progress(tally: Tally) -> None:
        if sys.stderr.isatty():
            print(f"\r{tally.schedules} schedules", end="", file=sys.stderr)

    tally = run_many(options.seed, options.schedules, options.bug, options.workers, progress)
    _print(tally, time.perf_counter() - began)
    return int(bool(tally.violations))


def _print(tally: Tally, seconds: float) -> None:
    print(
        f"{tally.schedules} schedules, {tally.events} events, {tally.commits} commits, {tally.finished} runs to their end, "
        f"{seconds:.0f} s"
    )
    print("faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(tally.faults.items())))
    listed = {(stage.value, event.__name__) for stage, event in commit.TABLE}
    print(f"commit table: {len(listed & set(tally.reached))} of {len(listed)} entries reached")
    for stage, event in sorted(listed - set(tally.reached)):
        print(f"  not reached: {event} when {stage}")
    print(f"violations: {len(tally.violations)}")
    for seed, text in sorted(tally.violations)[:SHOWN]:
        print(f"  seed {seed}: {text}")


if __name__ == "__main__":
    sys.exit(main())
