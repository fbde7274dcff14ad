"""What ftrain costs a run that nothing happens to: steps a second beside torchrun's, on this machine, in turn.

The same script and model under torchrun without any checkpoints, under `ftrain launch` with snapshots and commits off,
with its defaults, and with a snapshot in memory after each step. Each run's rate is that of its own middle: the first
steps are left out. Two launchers on this host are two nodes.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch
from launchers.ftrain import Ftrain
from launchers.torchrun import Torchrun

NEVER = 1_000_000  # steps between two checkpoints of the script's own
PATIENCE_SECONDS = 600.0  # with one run


class FtrainThatSaves(Ftrain):
    """With the flags for checkpoints that it is measured with."""

    def __init__(self, path: Path, args: argparse.Namespace, steps: int, saving: tuple[str, ...]) -> None:
        super().__init__(path, args, steps)
        self._saving = saving

    def saving_flags(self) -> list[str]:
        return list(self._saving)


SUBJECTS: dict[str, tuple[str, ...] | None] = {  # ftrain's flags for checkpoints
    "torchrun, no checkpoints": None,
    "ftrain, nothing saved": ("--checkpoint-every", "off", "--snapshot-every", "off"),
    "ftrain, defaults": (),
    "ftrain, a snapshot each step": ("--snapshot-every", "1"),
}


def step_seconds(saving: tuple[str, ...] | None, args: argparse.Namespace, directory: Path) -> list[float]:
    """How long each step took, on rank 0, without the first ones."""
    steps = args.warmup + args.steps
    job = Torchrun(directory, args, steps) if saving is None else FtrainThatSaves(directory, args, steps, saving)
    try:
        job.start()
        job.final_parameters(PATIENCE_SECONDS)
        times = [line.at for line in job.lines(0)]
    finally:
        job.stop()
    return [later - earlier for earlier, later in pairwise(times)][args.warmup :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2, help="on each node")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=15)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    args = parser.parse_args()
    args.checkpoint_every, args.hurt = NEVER, ""
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), torch {torch.__version__}"
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine}")
    rates: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    with tempfile.TemporaryDirectory(prefix="ftrain-steady-") as directory:
        for number in range(args.repeats):
            for name in SUBJECTS if number % 2 == 0 else reversed(SUBJECTS):
                place = Path(directory) / f"{number}-{name.replace(', ', '-').replace(' ', '-')}"
                seconds = step_seconds(SUBJECTS[name], args, place)
                rates[name].append(len(seconds) / sum(seconds))
                print(f"{name}: {rates[name][-1]:.3f} steps/s", flush=True)
    what = f"{args.nodes} x {args.ranks}, {args.parallel.upper()}, {args.repeats} runs each"
    print(f"\n| {what} | steps/s | of torchrun's, run by run |")
    print("|---|---|---|")
    first = next(iter(SUBJECTS))
    for name, own in rates.items():
        shares = [one / other for one, other in zip(own, rates[first], strict=True)]
        share = f"{statistics.median(shares):.1%} ({min(shares):.1%}-{max(shares):.1%})"
        print(f"| {name} | {statistics.median(own):.3f} ({min(own):.3f}-{max(own):.3f}) | {share} |")


if __name__ == "__main__":
    main()
