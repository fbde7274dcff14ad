"""How long a killed rank stops a run, under `ftrain launch` and under torchrun, one after the other on this machine.

Measured from SIGKILL of the last rank to the moment when every rank has finished a step that no rank had finished
before the kill; the steps that are done again are part of that time. Two launchers on this host are two nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

SCRIPT = Path(__file__).parent / "scripts" / "small_gpt.py"
FTRAIN = [sys.executable, "-m", "ftrain.cli.main"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LAUNCHERS = ("torchrun", "ftrain")
PATIENCE_SECONDS = 90.0
CALM_PERCENT = 30.0
SETTLE_STEPS = 7  # before a kill: more than one checkpoint interval of undisturbed steps


@dataclass(frozen=True)
class Finished:
    """One finished step of one rank."""

    at: float
    step: int
    pid: int


@dataclass(frozen=True)
class Recovery:
    """One kill, in seconds after it."""

    first_step_seconds: float  # every rank has finished some step
    new_step_seconds: float  # every rank has finished a step that nobody had finished before
    redone_steps: int
    step_seconds: float  # median of the undisturbed steps before
    noticed_seconds: float | None  # ftrain has named the failure
    looping_seconds: float | None  # every rank of ftrain has its state back and begins its first step

    def __str__(self) -> str:
        return (
            f"new step {self.new_step_seconds:.2f} s after the kill, any step {self.first_step_seconds:.2f} s, "
            f"{self.redone_steps} redone, a step takes {self.step_seconds:.2f} s"
        )


class NotBackError(Exception):
    """The run made no new step within `PATIENCE_SECONDS` of a kill."""


@dataclass
class Job:
    """One run of the script under one launcher, below `path`. All its processes carry its mark in their environment."""

    launcher: str
    path: Path
    args: argparse.Namespace
    mark: str = field(default_factory=lambda: f"FTRAIN_BENCH_MARK={uuid.uuid4().hex}")
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        return int(self.args.nodes * self.args.ranks)

    def start(self) -> None:
        self.path.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as found:
            endpoint = f"127.0.0.1:{found.getsockname()[1]}"
        if self.launcher == "ftrain":
            subprocess.run([*FTRAIN, "secret", str(self.path / "secret")], check=True, capture_output=True)
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, name: value, "OMP_NUM_THREADS": "1"}
        for node in range(self.args.nodes):
            with (self.path / f"output-{node}.txt").open("wb") as output:
                self.nodes.append(
                    subprocess.Popen(
                        [*self._flags(node, endpoint), str(SCRIPT), self.launcher, *self._script_flags()],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=environment,
                    )
                )

    def _flags(self, node: int, endpoint: str) -> list[str]:
        size = ["--nnodes", str(self.args.nodes), "--nproc-per-node", str(self.args.ranks)]
        common = [*size, "--rdzv-endpoint", endpoint]
        if self.launcher == "torchrun":
            return [*TORCHRUN, *common, "--rdzv-backend", "c10d", "--rdzv-id", "bench", "--max-restarts", "100"]
        own = ["--node-rank", str(node), "--run-dir", str(self.path / "run"), "--secret", str(self.path / "secret")]
        every = ("--checkpoint-every", str(self.args.checkpoint_every), "--snapshot-every", self.args.snapshot_every)
        return [*FTRAIN, "launch", *common, *own, *every]

    def _script_flags(self) -> list[str]:
        names = ("parallel", "layers", "width", "batch", "length", "checkpoint_every")
        flags = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(self.args, name)))]
        return ["--records", str(self.path), *flags]

    def finished(self) -> list[list[Finished]]:
        """The finished steps of each rank so far, without ftrain's rehearsals.

        An ftrain run whose ranks are all new may do its first step twice, the first time for nothing: of two lines of
        one process for one step only the second counts. The newest line may be such a first one, so it waits for the
        next to show it.
        """
        ranks = []
        for rank in range(self.world_size):
            lines = self._lines(rank)
            pairs = itertools.pairwise(lines)
            ranks.append([line for line, later in pairs if (line.pid, line.step) != (later.pid, later.step)])
        return ranks

    def _lines(self, rank: int) -> list[Finished]:
        path = self.path / f"rank-{rank}"
        text = path.read_text() if path.exists() else ""
        words = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [Finished(float(at), int(step), int(pid)) for at, step, pid in words]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Raises `NotBackError` where that takes too long or a launcher ends, with the ends of what they printed."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            ended = any(node.poll() is not None for node in self.nodes)
            if ended or time.monotonic() > deadline:
                outputs = sorted(self.path.glob("output-*.txt"))
                tails = "\n".join(path.read_text(errors="replace")[-1500:] for path in outputs)
                why = "a launcher ended before" if ended else f"waited {PATIENCE_SECONDS:.0f} s in vain for"
                raise NotBackError(f"{why} {what}; the ends of the output:\n{tails}")
            time.sleep(0.005)

    def kill_last_rank(self, phase: int) -> Recovery:
        """Kill the last rank once `phase` steps are done since a checkpoint; wait until every rank got further."""
        newest = [lines[-1].step if lines else 0 for lines in map(self._lines, range(self.world_size))]
        settled = min(newest) + SETTLE_STEPS
        aim = settled + (phase - settled - 1) % self.args.checkpoint_every
        self.wait(lambda: any(line.step >= aim for line in self._lines(0)), f"step {aim}")
        victim = self._lines(self.world_size - 1)[-1].pid
        killed_at = time.time()
        os.kill(victim, signal.SIGKILL)
        lines = [line for rank in range(self.world_size) for line in self._lines(rank)]
        furthest = max(line.step for line in lines if line.at <= killed_at)
        undisturbed = [line.at for line in self._lines(0) if line.at <= killed_at][-SETTLE_STEPS:]

        def first_beyond(step: int) -> list[list[Finished]]:
            """For each rank, what it finished with a number above `step`, once all were there again.

            What a rank of ftrain does before is done alone, for its random numbers.
            """
            since = killed_at
            if self.launcher == "ftrain":
                seconds = self._event_seconds("resumed", killed_at)
                since = killed_at + seconds if seconds is not None else float("inf")
            return [[done for done in rank if done.at > since and done.step > step] for rank in self.finished()]

        self.wait(lambda: all(first_beyond(furthest)), f"a step beyond {furthest} after the kill")
        again = first_beyond(-1)
        return Recovery(
            first_step_seconds=max(done[0].at for done in again) - killed_at,
            new_step_seconds=max(done[0].at for done in first_beyond(furthest)) - killed_at,
            redone_steps=furthest + 1 - again[-1][0].step,
            step_seconds=statistics.median(b - a for a, b in itertools.pairwise(undisturbed)),
            noticed_seconds=self._event_seconds("interruption", killed_at),
            looping_seconds=self._event_seconds("resumed", killed_at),
        )

    def _event_seconds(self, event: str, killed_at: float) -> float | None:
        """When ftrain's own story first tells of such an event after the kill; torchrun tells none."""
        path = self.path / "run" / "events.jsonl"
        told = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        times = [one["unix_seconds"] - killed_at for one in told if one["event"] == event]
        return next((seconds for seconds in times if seconds > 0), None)

    def stop(self) -> None:
        """End everything that carries this job's mark, by its process id."""
        for node in self.nodes:
            node.kill()
            node.wait()
        for _ in range(200):
            left = self._processes()
            for pid in left:
                _kill(pid)
            if not left:
                return
            time.sleep(0.05)
        raise SystemExit(f"processes of {self.launcher} cannot be ended: {left}")

    def _processes(self) -> list[int]:
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (directory / "environ").read_bytes().split(b"\0"):
                    found.append(int(directory.name))
            except OSError:
                continue
        return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def measure(args: argparse.Namespace, directory: Path) -> dict[str, list[Recovery]]:
    """Runs of torchrun and of ftrain in turn, up to `kills` in each, until each has had `repeats`."""
    found: dict[str, list[Recovery]] = {launcher: [] for launcher in LAUNCHERS}
    for first in range(0, args.repeats, args.kills):
        for launcher in LAUNCHERS:
            wait_for_calm(args.calm)
            job = Job(launcher, directory / f"{launcher}-{first}", args)
            try:
                job.start()
                for kill in range(first, min(first + args.kills, args.repeats)):
                    recovery = job.kill_last_rank(phase=kill % args.checkpoint_every)
                    print(f"{launcher}: {recovery} (load {os.getloadavg()[0]:.1f})", flush=True)
                    found[launcher].append(recovery)
            except NotBackError as error:
                print(f"{launcher}: {error}", flush=True)
            finally:
                job.stop()
    return found


def wait_for_calm(seconds_max: float) -> None:
    """Until the processors were mostly idle for two seconds, but no longer than `seconds_max`."""
    deadline = time.monotonic() + seconds_max
    while time.monotonic() < deadline and psutil.cpu_percent(interval=2) > CALM_PERCENT:
        pass


def table(found: dict[str, list[Recovery]], args: argparse.Namespace) -> str:
    """Markdown: a row for each launcher, and what share of torchrun's time ftrain takes."""
    rows = [
        "| nodes x ranks | launcher | kills | kill to new step on all | kill to any step on all | redone | step |",
        "|---|---|---|---|---|---|---|",
    ]
    for launcher, own in found.items():
        columns = (
            f"{args.nodes} x {args.ranks}, {args.parallel.upper()}",
            launcher,
            f"{len(own)} of {args.repeats}",
            spread([recovery.new_step_seconds for recovery in own]),
            spread([recovery.first_step_seconds for recovery in own]),
            f"{statistics.mean(recovery.redone_steps for recovery in own):.1f}" if own else "-",
            f"{statistics.median(recovery.step_seconds for recovery in own):.2f} s" if own else "-",
        )
        rows.append(f"| {' | '.join(columns)} |")
    noticed = [one.noticed_seconds for one in found["ftrain"] if one.noticed_seconds is not None]
    looping = [one.looping_seconds for one in found["ftrain"] if one.looping_seconds is not None]
    return "\n".join(
        [
            *rows,
            "",
            f"{comparison(found)} A kill is counted only if a new step came within {PATIENCE_SECONDS:.0f} s.",
            f"ftrain after the kill: failure named {spread(noticed)}; all ranks back in their loop {spread(looping)}.",
        ]
    )


def comparison(found: dict[str, list[Recovery]]) -> str:
    if not all(found.values()):
        return "One launcher never came back after a kill: nothing to compare."
    theirs, ours = (statistics.median(one.new_step_seconds for one in found[launcher]) for launcher in LAUNCHERS)
    return f"To the next new step ftrain takes {ours / theirs:.3f} of torchrun's time, 1/{theirs / ours:.1f}."


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} s ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="on each node")
    parser.add_argument("--repeats", type=int, default=5, help="kills under each launcher")
    parser.add_argument("--kills", type=int, default=2, help="of them in one run, before the launchers take turns")
    parser.add_argument(
        "--calm", type=float, default=0.0, help="wait so many seconds for others to leave the machine idle"
    )
    parser.add_argument("--checkpoint-every", type=int, default=5, help="steps")
    parser.add_argument("--snapshot-every", default="1", help="ftrain's snapshots in memory: steps, 10s or off")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    if args.nodes * args.ranks < 2:
        parser.error("one rank alone has no peers to wait for: give at least two, --nodes 2 --ranks 1")
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), torch {torch.__version__}"
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="ftrain-bench-") as directory:
        found = measure(args, Path(directory))
    print(table(found, args))


if __name__ == "__main__":
    main()
