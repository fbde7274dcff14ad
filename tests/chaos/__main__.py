"""Hurts a real run many times by a seed, and compares its end with that of an unhurt run.

python -m tests.chaos --faults 200 --seed 0             two nodes of two ranks, all kinds of faults that there are here
python -m tests.chaos --faults 200 --alone              the coordinator is a process by itself, and is hurt too
python -m tests.chaos --faults 200 --disk               the run directory is on a disk that is full or slow at times
python -m tests.chaos --faults 520 --leaks              one node; rank 0 survives all, and nothing may grow
python -m tests.chaos --faults 520 --leaks --alone      the same with two nodes and a coordinator by itself
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import disk
from tests.chaos.leaks import RECORDER, RECORDS, Leaks
from tests.chaos.plan import KINDS, STEPS_PER_FAULT, Shape
from tests.chaos.report import Report, report
from tests.chaos.run import Chaos, Stalled, ends_as_unhurt
from tests.launching.harness import clusters


def main() -> None:
    args = _arguments()
    if args.disk and (why := disk.available()):
        sys.exit(f"--disk: {why}")
    shape = Shape(args.nodes, args.ranks, args.alone, args.disk, lease_seconds=args.lease)
    kinds = tuple(args.kind or KINDS)
    environment = {}
    if args.leaks:
        nodes, ranks = (2, 1) if args.alone else (1, 2)
        shape, kinds = Shape(nodes, ranks, args.alone, spared=0, lease_seconds=args.lease), ("kill a rank",)
        environment[RECORDER] = str(args.records)
    with contextlib.ExitStack() as stack:
        if args.directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ftrain-chaos-")))
        else:
            directory = args.directory
            directory.mkdir(parents=True)
        for cluster in clusters(directory):
            chaos = Chaos(
                cluster, args.seed, args.faults, args.parallel, shape, kinds, args.steps_per_fault, environment
            )
            found = _run(chaos, args.every)
            print(found.text())
            if args.report is not None:
                args.report.write_text(found.encode())
            sys.exit(0 if found.good else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="of each node")
    parser.add_argument("--alone", action="store_true", help="the coordinator is a process by itself")
    parser.add_argument("--disk", action="store_true", help="on a file system of its own; for root")
    parser.add_argument("--steps-per-fault", type=int, default=STEPS_PER_FAULT, help="the run ends after so many")
    parser.add_argument("--lease", type=float, default=3.0, help="seconds")
    parser.add_argument("--kind", action="append", choices=tuple(KINDS), help="only these kinds; may be repeated")
    parser.add_argument("--leaks", action="store_true", help="two ranks, rank 0 is spared; looks at what is held")
    parser.add_argument("--records", type=int, default=RECORDS, help="of --leaks: collectives that torch remembers")
    parser.add_argument("--every", type=int, default=10, help="look at what is held after so many faults")
    parser.add_argument("--directory", type=Path, help="a new one, for everything; it is kept")
    parser.add_argument("--report", type=Path, help="a file for the report, as JSON")
    return parser.parse_args()


def _run(chaos: Chaos, every: int) -> Report:
    began = time.monotonic()
    leaks = Leaks()

    def sample(number: int) -> None:
        if number % every == 0:
            leaks.look(chaos, number)
            print(f"{number} faults, {time.monotonic() - began:.0f} s", flush=True)

    try:
        chaos.run(sample)
    except Stalled as error:
        sys.exit(str(error))
    seconds = time.monotonic() - began
    return report(chaos, leaks, seconds, ends_as_unhurt(chaos))


if __name__ == "__main__":
    main()
