"""Feeds bad inputs to the parsers of what others write. Anything but one of ftrain's errors is a finding.

python -m tests.fuzz --minutes 5               all parsers in turn, by mutation
python -m tests.fuzz --executions 10_000_000   so many inputs for each parser
python -m tests.fuzz --minutes 5 --atheris     led by coverage, where atheris is installed
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import signal
import subprocess
import sys
import time

from tests.fuzz.mutate import Sample, below, mutated
from tests.fuzz.targets import TARGETS, execute, samples

SLOW_SECONDS = 2.0
KEPT_MAX = 400  # inputs that were taken, to go on from
SIZE_KEPT_MAX = 20_000  # bytes
HANG_SECONDS = 60.0  # of processor time, for
WATCHED = 1000  # executions


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--executions", type=int, help="of each parser, instead of minutes of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=sorted(TARGETS))
    parser.add_argument("--atheris", action="store_true")
    arguments = parser.parse_args()
    chosen = [arguments.target] if arguments.target else list(TARGETS)
    seconds = (arguments.minutes or 1.0) * 60 / len(chosen)
    findings = 0
    for target in chosen:
        if arguments.atheris:
            findings += led_by_coverage(target, seconds)
        elif arguments.executions:
            findings += by_mutation(target, arguments.seed, executions=arguments.executions)
        else:
            findings += by_mutation(target, arguments.seed, seconds=seconds)
    print(f"{findings} findings")
    sys.exit(1 if findings else 0)


def by_mutation(target: str, seed: int, *, executions: int = sys.maxsize, seconds: float = float("inf")) -> int:
    """The number of findings. A hang ends the process, with the line that it hangs at."""
    faulthandler.register(signal.SIGPROF, chain=True)  # what SIGPROF does otherwise is to end the process
    dice = random.Random(f"{seed} {target}")
    kept = [Sample.of(data) for data in samples(target)]
    first = len(kept)
    done = taken = findings = 0
    slowest = 0.0
    began = time.monotonic()
    before = time.process_time()
    while done < executions and (done % WATCHED or time.monotonic() - began < seconds):
        if done % WATCHED == 0:
            signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
        data = mutated(kept[below(len(kept), dice)], dice)
        try:
            good = execute(target, data)
        except Exception as error:
            findings += 1
            if findings <= 5:
                print(f"{target}: {type(error).__name__}: {error!s:.200}\n  {data!r:.500}", flush=True)
            good = False
        now = time.process_time()  # what it took to make the input is in it
        if now - before > slowest:
            slowest = now - before
            if slowest > SLOW_SECONDS:
                findings += 1
                print(f"{target}: {slowest:.1f} s for {data!r:.200}", flush=True)
        before = now
        done += 1
        if good:
            taken += 1
            if len(data) < SIZE_KEPT_MAX and (len(kept) < KEPT_MAX or taken % 8 == 0):
                sample = Sample.of(data)
                if len(kept) < KEPT_MAX:
                    kept.append(sample)
                else:  # never one of those that it began with
                    kept[first + below(KEPT_MAX - first, dice)] = sample
    signal.setitimer(signal.ITIMER_PROF, 0)
    rate = done / max(1e-9, time.monotonic() - began)
    print(
        f"{target:12} {done:11,} executions, {rate:7,.0f} a second, {taken:,} taken, slowest {slowest:.3f} s, "
        f"{findings} findings",
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
