"""How long a killed rank stops a run, under `ftrain launch` and under others, one after the other on this machine.

Measured from SIGKILL of the last rank to the moment when every rank, their number full again, has finished a step that
no rank had finished before the kill; the steps that are done again are part of that time. Each kill comes at another
moment of a step and at another distance from a checkpoint. Two launchers on this host are two nodes. Instead of a kill
it may be SIGSTOP, the loss of the last rank's whole node, or a cut of its link (`--hurt`): then each node has a network
namespace of its own, the link is healed after each recovery, and the node that was cut off is the next one's spare.
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
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
from launchers import LAUNCHERS, Job, NotBackError, Recovery
from launchers.job import HURTS, PATIENCE_SECONDS

CALM_PERCENT = 30.0
SPREAD = (5**0.5 - 1) / 2  # its multiples, without the whole numbers, lie evenly between 0 and 1
VERIFY_STEPS = 25  # of a run that is to end, two checkpoint intervals and more after its kill


@dataclass
class Outcomes:
    """What became of the kills under one launcher."""

    back: list[Recovery] = field(default_factory=list)
    in_vain: int = 0  # no new step within `PATIENCE_SECONDS`

    def seconds(self) -> list[float]:
        """To the next new step on all ranks, where one came."""
        return [recovery.new_step_seconds for recovery in self.back]


def measure(names: list[str], args: argparse.Namespace, directory: Path) -> dict[str, Outcomes]:
    """Runs of each launcher in turn, up to `kills` in each, until each has had `repeats`."""
    found = {name: Outcomes() for name in names}
    for first in range(0, args.repeats, args.kills):
        for name in names:
            wait_for_calm(args.calm)
            job = LAUNCHERS[name](directory / f"{name}-{first}", args)
            try:
                job.start()
                for kill in range(first, min(first + args.kills, args.repeats)):
                    recovery = job.hurt_last_rank(phase=kill % args.checkpoint_every, into=kill * SPREAD % 1)
                    print(f"{name}: {recovery} (load {os.getloadavg()[0]:.1f})", flush=True)
                    found[name].back.append(recovery)
                    job.mend()
            except NotBackError as error:
                found[name].in_vain += job.is_hurt
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
            job.hurt_last_rank(phase=0)
            job.mend()
        return job.final_parameters()
    finally:
        job.stop()


def wait_for_calm(seconds_max: float) -> None:
    """Until the processors were mostly idle for two seconds, but no longer than `seconds_max`."""
    deadline = time.monotonic() + seconds_max
    while time.monotonic() < deadline and psutil.cpu_percent(interval=2) > CALM_PERCENT:
        pass


def table(found: dict[str, Outcomes], args: argparse.Namespace) -> str:
    """Markdown: a row for each launcher, and what share of the others' time ftrain takes."""
    what = HURTS[args.hurt]
    rows = [
        f"| nodes x ranks | launcher | back | {what} to new step on all | {what} to any step on all | redone | step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in found.items():
        columns = (
            f"{args.nodes} x {args.ranks}, {args.parallel.upper()}",
            name,
            f"{len(own.back)} of {len(own.back) + own.in_vain}",
            spread(own.seconds()),
            spread([recovery.first_step_seconds for recovery in own.back]),
            f"{statistics.mean(recovery.redone_steps for recovery in own.back):.1f}" if own.back else "-",
            f"{statistics.median(recovery.step_seconds for recovery in own.back):.2f} s" if own.back else "-",
        )
        rows.append(f"| {' | '.join(columns)} |")
    return "\n".join([*rows, "", *comparisons(found), *stages(found)])


def comparisons(found: dict[str, Outcomes]) -> list[str]:
    """Of medians: over what came back, and, where that was not all, over everything."""
    ours = found.get("ftrain")
    others = {name: own for name, own in found.items() if name != "ftrain"}
    if ours is None or not ours.back or not others:
        return []
    own = statistics.median(ours.seconds())
    medians = {name: statistics.median(other.seconds()) for name, other in others.items() if other.back}
    shares = [f"{own / theirs:.3f} of {name}'s (1/{theirs / own:.1f})" for name, theirs in medians.items()]
    lines = (
        [f"To the next new step ftrain takes this share of the others' time: {', '.join(shares)}."] if shares else []
    )
    if any(outcomes.in_vain for outcomes in found.values()):
        bound = PATIENCE_SECONDS
        every = {name: one.seconds() + one.in_vain * [bound] for name, one in found.items()}
        own = statistics.median(every.pop("ftrain"))
        shares = [
            f"{own / (theirs := statistics.median(all_of)):.3f} (1/{theirs / own:.1f}) of {name}'s"
            for name, all_of in every.items()
        ]
        lines.append(
            f"That leaves out who was not back within {bound:.0f} s. Counted as {bound:.0f} s: {', '.join(shares)}."
        )
    return lines


def stages(found: dict[str, Outcomes]) -> list[str]:
    """What else the launchers told, a line for each that did."""
    lines = []
    for name, own in found.items():
        told = dict.fromkeys(what for recovery in own.back for what in recovery.stages)
        if told:
            spreads = (
                f"{what} {spread([one.stages[what] for one in own.back if what in one.stages])}" for what in told
            )
            lines.append(f"{name} after that: {'; '.join(spreads)}.")
        sources = Counter(recovery.source for recovery in own.back if recovery.source)
        if sources:
            lines.append(f"{name} went on from: {', '.join(f'{what} {times}' for what, times in sources.items())}.")
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
    parser.add_argument(
        "--hurt",
        choices=tuple(HURTS),
        default="kill",
        help="the last rank, or its node, or that node's link, where a spare waits",
    )
    parser.add_argument("--verify", action="store_true", help="compare final parameters too: two more runs of each")
    parser.add_argument(
        "--calm", type=float, default=0.0, help="wait so many seconds for others to leave the machine idle"
    )
    parser.add_argument("--checkpoint-every", type=int, default=5, help="steps")
    parser.add_argument(
        "--snapshot-every", default="auto", help="ftrain's snapshots in memory: steps, 10s, auto or off"
    )
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    if args.nodes * args.ranks < 2:
        parser.error("one rank alone has no peers to wait for: give at least two, --nodes 2 --ranks 1")
    if args.hurt == "node":
        args.kills = 1  # for one spare node waits in each run
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
