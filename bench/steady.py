"""What ftrain costs a run that nothing happens to: steps a second beside torchrun's, on this machine, in turn.

The same script and model under torchrun without any checkpoints, under `ftrain launch` with snapshots and commits off,
and with its defaults. Each run's rate is that of its own middle: the first steps are left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch

SCRIPT = Path(__file__).parent / "scripts" / "small_gpt.py"
NEVER = 1_000_000  # steps between two checkpoints of the script's own
FLAGS = {
    "torchrun, no checkpoints": (),
    "ftrain, nothing saved": ("--checkpoint-every", "off", "--snapshot-every", "off"),
    "ftrain, defaults": (),
    "ftrain, a snapshot each step": ("--snapshot-every", "1"),
}


def step_seconds(name: str, args: argparse.Namespace, directory: Path) -> list[float]:
    """How long each step took, on rank 0, without the first ones."""
    directory.mkdir()
    launcher = name.partition(",")[0]
    size = ("--nproc-per-node", str(args.ranks))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *size]
    if launcher == "ftrain":
        command = [sys.executable, "-m", "ftrain.cli.main", "launch", *size, "--run-dir", str(directory / "run")]
    script = [str(SCRIPT), launcher, "--records", str(directory), "--steps", str(args.warmup + args.steps)]
    model = ["--layers", str(args.layers), "--width", str(args.width), "--batch", str(args.batch)]
    own = ["--checkpoint-every", str(NEVER), "--parallel", args.parallel]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (directory / "output.txt").open("wb") as output:
        subprocess.run(
            [*command, *FLAGS[name], *script, *model, *own], check=True, stdout=output, stderr=output, env=environment
        )
    times = [float(line.split()[0]) for line in (directory / "rank-0").read_text().splitlines()]
    return [later - earlier for earlier, later in pairwise(times)][args.warmup :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=15)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    args = parser.parse_args()
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), torch {torch.__version__}"
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine}")
    rates: dict[str, list[float]] = {name: [] for name in FLAGS}
    with tempfile.TemporaryDirectory(prefix="ftrain-steady-") as directory:
        for number in range(args.repeats):
            for name in FLAGS if number % 2 == 0 else reversed(FLAGS):
                seconds = step_seconds(
                    name, args, Path(directory) / f"{number}-{len(rates[name])}-{name.replace(' ', '-')}"
                )
                rates[name].append(len(seconds) / sum(seconds))
                print(f"{name}: {rates[name][-1]:.3f} steps/s", flush=True)
    what = f"{args.ranks} ranks, {args.parallel.upper()}, {args.repeats} runs each"
    print(f"\n| {what} | steps/s | of torchrun's, run by run |")
    print("|---|---|---|")
    first = next(iter(FLAGS))
    for name, own in rates.items():
        shares = [one / other for one, other in zip(own, rates[first], strict=True)]
        share = f"{statistics.median(shares):.1%} ({min(shares):.1%}-{max(shares):.1%})"
        print(f"| {name} | {statistics.median(own):.3f} ({min(own):.3f}-{max(own):.3f}) | {share} |")


if __name__ == "__main__":
    main()
