"""`python -m tests.simulator --schedules N --seed S`: run many schedules; `--trace SEED`: read one of them."""

from __future__ import annotations

import argparse
import sys
import time

from ftrain.core import commit
from tests.simulator import bugs
from tests.simulator.batch import Tally, run_many, trace

PROGRESS = 10_000  # schedules between two lines
SHOWN = 20  # violations that are printed


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

    shown = 0

    def progress(tally: Tally) -> None:
        nonlocal shown
        for seed, text in tally.violations[shown:]:
            print(f"seed {seed}: {text}", file=sys.stderr, flush=True)
        shown = len(tally.violations)
        if tally.schedules % PROGRESS == 0:
            print(f"{tally.schedules} schedules, {len(tally.violations)} violations", file=sys.stderr, flush=True)

    tally = run_many(options.seed, options.schedules, options.bug, options.workers, progress)
    _print(tally, time.perf_counter() - began)
    return int(bool(tally.violations))


def _print(tally: Tally, seconds: float) -> None:
    print(
        f"{tally.schedules} schedules, {tally.events} events, {tally.commits} commits, "
        f"{tally.finished} runs to their end, {seconds:.0f} s"
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
