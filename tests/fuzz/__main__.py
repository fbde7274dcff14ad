"""Feeds bad inputs to the parsers of what others write. Anything but one of ftrain's errors is a finding.

python -m tests.fuzz --minutes 5               all parsers in turn, by mutation
python -m tests.fuzz --minutes 5 --atheris     led by coverage, where atheris is installed
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS, execute, samples

SLOW_SECONDS = 2.0
KEPT_MAX = 400  # inputs that were taken, to go on from


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=sorted(TARGETS))
    parser.add_argument("--atheris", action="store_true")
    arguments = parser.parse_args()
    chosen = [arguments.target] if arguments.target else list(TARGETS)
    seconds = arguments.minutes * 60 / len(chosen)
    findings = 0
    for target in chosen:
        if arguments.atheris:
            findings += led_by_coverage(target, seconds)
        else:
            findings += by_mutation(target, seconds, arguments.seed)
    print(f"{findings} findings")
    sys.exit(1 if findings else 0)


def by_mutation(target: str, seconds: float, seed: int) -> int:
    dice = random.Random(seed)
    kept = samples(target)
    executions = taken = findings = 0
    slowest = 0.0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutated(dice.choice(kept), dice)
        began = time.process_time()
        try:
            good = execute(target, data)
        except Exception as error:
            findings += 1
            if findings <= 5:
                print(f"{target}: {type(error).__name__}: {error!s:.200}\n  {data!r:.500}", flush=True)
            good = False
        spent = time.process_time() - began
        slowest = max(slowest, spent)
        if spent > SLOW_SECONDS:
            findings += 1
            print(f"{target}: {spent:.1f} s for {data!r:.200}", flush=True)
        executions += 1
        taken += good
        if good and len(data) < 20_000:
            kept = [*kept[-KEPT_MAX:], data]
    print(
        f"{target:12} {executions:9} executions, {taken} taken, slowest {slowest:.3f} s, {findings} findings",
        flush=True,
    )
    return findings


def led_by_coverage(target: str, seconds: float) -> int:
    """In a process of its own: atheris never returns."""
    command = [sys.executable, "-m", "tests.fuzz.coverage", target, f"-max_total_time={max(1, round(seconds))}"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    lines = done.stderr.splitlines()
    print(f"{target:12} {next((line for line in reversed(lines) if line.startswith('Done')), lines[-1:])}", flush=True)
    if done.returncode:
        print("\n".join(lines[-30:]))
    return int(done.returncode != 0)


if __name__ == "__main__":
    main()
