"""Hurts a real run many times by a seed, and compares its end with that of an unhurt run.

python -m tests.chaos --faults 1000 --seed 0            two nodes of two ranks, all kinds of faults
python -m tests.chaos --faults 500 --leaks              one node, rank 0 survives them all: what it holds must not grow
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.run import Chaos
from tests.launching.harness import clusters
from tests.recovery.account import Job, launch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--leaks", action="store_true", help="rank 0 is spared, and what it holds is shown")
    parser.add_argument("--every", type=int, default=50, help="show what is held after so many faults")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ftrain-chaos-") as directory:
        for cluster in clusters(Path(directory)):
            more = {"nodes": 1, "ranks": 2, "kinds": ("kill a rank",), "spared": 0} if args.leaks else {}
            chaos = Chaos(cluster, args.seed, args.faults, args.parallel, **more)  # type: ignore[arg-type]

            def sample(number: int, chaos: Chaos = chaos) -> None:
                if number % args.every == 0:
                    print(f"{number} faults, {time.monotonic() - began:.0f} s, {chaos.held()}", flush=True)

            chaos.run(sample)
            unhurt = Job(cluster.path / "unhurt")
            ranks = chaos.nodes * chaos.ranks
            more_flags = ("--pause", 0, "--norm", "layer")
            reference = launch(
                cluster, unhurt, args.parallel, ranks=ranks, every="off", steps=chaos.steps, more=more_flags
            )
            assert reference.wait(600) == 0, reference.text
            same = chaos.job.history() == unhurt.history() and chaos.job.end() == unhurt.end()
            generations = len(chaos.job.journal("generation"))
            commits = chaos.job.commits()
            print(f"{sum(chaos.done.values())} faults: {dict(chaos.done)}")
            print(f"{generations} generations, {len(commits)} commits, {time.monotonic() - began:.0f} s")
            print(f"bit for bit as the unhurt run: {same}; no process left: {cluster.nothing_left()}")
            sys.exit(0 if same and commits == sorted(commits) else 1)


if __name__ == "__main__":
    main()
