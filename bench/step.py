"""What `ftrain launch` adds to each step of a run that nothing happens to: how long, and in which functions.

A run of one rank does steps with nothing in them, of a model with AdamW's state that is tracked: what is left is what
`run.steps()` and `with step` do. Half of them are timed, the other half profiled. Nothing is saved, or a snapshot is
kept in memory as often as `--snapshot-every` says.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import pstats
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from launchers.ftrain import FTRAIN

SCRIPT = Path(__file__).parent / "scripts" / "empty_steps.py"
SHOWN = 14  # functions


def run(directory: Path, args: argparse.Namespace) -> tuple[float, pstats.Stats]:
    """Seconds a step without a profiler, and the profile of as many steps."""
    saving = ("--checkpoint-every", "off", "--snapshot-every", args.snapshot_every)
    flags = ("--records", str(directory), "--steps", str(args.steps), "--layers", str(args.layers))
    command = [*FTRAIN, "launch", "--run-dir", str(directory / "run"), *saving, str(SCRIPT), *flags]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((directory / "seconds.json").read_text()), pstats.Stats(str(directory / "profile"))


def rows(profile: pstats.Stats, steps: int) -> list[str]:
    """A row for each of the functions that took most by themselves."""
    found: list[tuple[float, str]] = []
    for (file, _, name), (_, calls, own, in_all, _) in profile.stats.items():  # type: ignore[attr-defined]
        where = f"{Path(file).stem}: {name}" if file.endswith(".py") else name
        found.append((own, f"| {where} | {calls / steps:.2f} | {own / steps * 1e6:.2f} | {in_all / steps * 1e6:.2f} |"))
    return [row for _, row in sorted(found, reverse=True)[:SHOWN]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000, help="that are timed, and that are profiled")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--snapshot-every", default="off")
    args = parser.parse_args()
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), torch {torch.__version__}"
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine}")
    with tempfile.TemporaryDirectory(prefix="ftrain-step-") as directory:
        seconds, profile = run(Path(directory), args)
    print(f"\n{args.steps} empty steps: {seconds * 1e6:.1f} us each\n")
    print("| function | calls a step | us a step by itself, profiled | with what it calls |")
    print("|---|---|---|---|")
    print("\n".join(rows(profile, args.steps)))


if __name__ == "__main__":
    main()
