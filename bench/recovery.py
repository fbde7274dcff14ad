"""How long a killed rank stops a run, under `ftrain launch` and under others, one after the other on this machine.

Measured from SIGKILL of the last rank to the moment when every rank, their number full again, has finished a step that
no rank had finished before the kill; the steps that are done again are part of that time. Two launchers on this host
are two nodes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
from launchers import LAUNCHERS, Job, NotBackError, Recovery
from launchers.job import PATIENCE_SECONDS

CALM_PERCENT = 30.0
VERIFY_STEPS = 25  # of a run that is to end, two checkpoint intervals and more after its kill


def measure(names: list[str], args: argparse.Namespace, directory: Path) -> dict[str, list[Recovery]]:
    """Runs of each launcher in turn, up to `kills` in each, until each has had `repeats`."""
    found: dict[str, list[Recovery]] = {name: [] for name in names}
    for first in range(0, args.repeats, args.kills):
        for name in names:
            wait_for_calm(args.calm)
            job = LAUNCHERS[name](directory / f"{name}-{first}", args)
            try:
                job.start()
                for kill in range(first, min(first + args.kills, args.repeats)):
                    recovery = job.kill_last_rank(phase=kill % args.checkpoint_every)
                    print(f"{name}: {recovery} (load {os.getloadavg()[0]:.1f})", flush=True)
                    found[name].append(recovery)
            except NotBackError as error:
                print(f"{name}: {error}", flush=True)
            finally:
                job.stop()
    return found


def verify(name: str, args: argparse.Namespace, directory: Path) -> str:
    """Whether a run with a kill ends with the parameters of one without, in a sentence."""
    if not LAUNCHERS[name].repeatable:
        return f"{name}: it goes on with fewer ranks, so its final parameters are not those of an unhurt run."
    unhurt, hurt = (LAUNCHERS[name](directory / f"{name}-{kind}", args, VERIFY_STEPS) for kind in ("unhurt", "hurt"))
    try:
        wanted = ended(unhurt, kill=False)
        same = ended(hurt, kill=True) == wanted
    except NotBackError as error:
        return f"{name}: final parameters not compared: {error}"
    return f"{name}: the final parameters are {'' if same else 'not '}those of an unhurt run."


def ended(job: Job, kill: bool) -> list[str]:
    try:
        job.start()
        if kill:
            job.kill_last_rank(phase=0)
        return job.final_parameters()
    finally:
        job.stop()


def wait_for_calm(seconds_max: float) -> None:
    """Until the processors were mostly idle for two seconds, but no longer than `seconds_max`."""
    deadline = time.monotonic() + seconds_max
    while time.monotonic() < deadline and psutil.cpu_percent(interval=2) > CALM_PERCENT:
        pass


def table(found: dict[str, list[Recovery]], args: argparse.Namespace) -> str:
    """Markdown: a row for each launcher, and what share of the others' time ftrain takes."""
    rows = [
        "| nodes x ranks | launcher | kills | kill to new step on all | kill to any step on all | redone | step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in found.items():
        columns = (
            f"{args.nodes} x {args.ranks}, {args.parallel.upper()}",
            name,
            f"{len(own)} of {args.repeats}",
            spread([recovery.new_step_seconds for recovery in own]),
            spread([recovery.first_step_seconds for recovery in own]),
            f"{statistics.mean(recovery.redone_steps for recovery in own):.1f}" if own else "-",
            f"{statistics.median(recovery.step_seconds for recovery in own):.2f} s" if own else "-",
        )
        rows.append(f"| {' | '.join(columns)} |")
    bound = f"A kill is counted only if a new step came within {PATIENCE_SECONDS:.0f} s."
    return "\n".join([*rows, "", " ".join([*comparisons(found), bound]), *stages(found)])


def comparisons(found: dict[str, list[Recovery]]) -> list[str]:
    medians = {name: statistics.median(one.new_step_seconds for one in own) for name, own in found.items() if own}
    ours = medians.pop("ftrain", None)
    if ours is None or not medians:
        return ["ftrain or all others never came back after a kill, or were left out: nothing to compare."]
    shares = [f"{ours / theirs:.3f} of {name}'s (1/{theirs / ours:.1f})" for name, theirs in medians.items()]
    return [f"To the next new step ftrain takes this share of the others' time: {', '.join(shares)}."]


def stages(found: dict[str, list[Recovery]]) -> list[str]:
    """What else the launchers told, a line for each that did."""
    lines = []
    for name, own in found.items():
        told = dict.fromkeys(what for recovery in own for what in recovery.stages)
        if told:
            spreads = (f"{what} {spread([one.stages[what] for one in own if what in one.stages])}" for what in told)
            lines.append(f"{name} after the kill: {'; '.join(spreads)}.")
    return lines


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} s ({min(values):.2f}-{max(values):.2f})"


def present(args: argparse.Namespace) -> list[str]:
    """The wanted launchers that can be measured here; a line for each other."""
    names = []
    for name in args.launchers or LAUNCHERS:
        why = LAUNCHERS[name].why_left_out(args)
        if why is None:
            names.append(name)
        else:
            print(f"{name} is left out: {why}")
    return names


def versions(names: list[str]) -> str:
    """What is measured, as it was installed."""
    providers = importlib.metadata.packages_distributions()
    packages = dict.fromkeys(["torch", *(LAUNCHERS[name].package for name in names)])
    found = dict.fromkeys(provider for package in packages for provider in providers.get(package, []))
    return ", ".join(f"{provider} {importlib.metadata.version(provider)}" for provider in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--launchers", nargs="+", choices=tuple(LAUNCHERS), help="all by default")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="on each node")
    parser.add_argument("--repeats", type=int, default=5, help="kills under each launcher; 0 with --verify alone")
    parser.add_argument("--kills", type=int, default=2, help="of them in one run, before the launchers take turns")
    parser.add_argument("--verify", action="store_true", help="compare final parameters too: two more runs of each")
    parser.add_argument(
        "--calm", type=float, default=0.0, help="wait so many seconds for others to leave the machine idle"
    )
    parser.add_argument("--checkpoint-every", type=int, default=5, help="steps")
    parser.add_argument("--snapshot-every", default="10s", help="ftrain's snapshots in memory: steps, 10s or off")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    if args.nodes * args.ranks < 2:
        parser.error("one rank alone has no peers to wait for: give at least two, --nodes 2 --ranks 1")
    names = present(args)
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), {versions(names)}"
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine}, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory(prefix="ftrain-bench-") as directory:
        found = measure(names, args, Path(directory))
        verdicts = [verify(name, args, Path(directory)) for name in names if args.verify]
    for line in (*([table(found, args)] if args.repeats else []), *verdicts):
        print(line)


if __name__ == "__main__":
    main()
