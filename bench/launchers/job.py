"""One run of the script under one launcher: start it, kill a rank, see when all ranks are further, end it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil

SCRIPTS = Path(__file__).parents[1] / "scripts"
PATIENCE_SECONDS = 90.0
HURTS = {  # as a table names them
    "kill": "kill",
    "stop": "stop",
    "node": "loss of the node",
    "link": "cut of the node's link",
    "link-sends": "cut of the node's link one way",
    "link-hears": "cut of the node's link the other way",
}
CUTS = ("link", "link-sends", "link-hears")
WITH_A_SPARE = ("node", *CUTS)  # another launcher waits to take the node's place
SPARE_SECONDS = 10.0  # for a spare launcher, to be there and idle
LOOK_SECONDS = 0.02  # at what the script wrote, which has the times: looking takes time from it
SETTLE_SECONDS = 4.0  # of steps by all ranks before a kill, and then
SETTLE_STEPS = 7  # more than one checkpoint interval of undisturbed steps


@dataclass(frozen=True)
class Finished:
    """One finished step of one rank."""

    at: float
    step: int
    pid: int


@dataclass(frozen=True)
class Recovery:
    """One kill, in seconds after it. All ranks means the full number of them."""

    first_step_seconds: float  # every rank has finished some step
    new_step_seconds: float  # every rank has finished a step that nobody had finished before
    redone_steps: int
    step_seconds: float  # median of the undisturbed steps before
    stages: dict[str, float]  # what else the launcher tells of
    source: str = ""  # what it says that the run went on from

    def __str__(self) -> str:
        return (
            f"new step {self.new_step_seconds:.2f} s after the kill, any step {self.first_step_seconds:.2f} s, "
            f"{self.redone_steps} redone, a step takes {self.step_seconds:.2f} s"
            + "".join(f"; {what} {seconds:.2f} s" for what, seconds in self.stages.items())
            + (f"; from {self.source}" if self.source else "")
        )


class NotBackError(Exception):
    """The run made no new step within `PATIENCE_SECONDS` of a kill."""


class Job(ABC):
    """One run of the script below `path`. All its processes carry its mark in their environment."""

    name: ClassVar[str]
    branch: ClassVar[str]  # of the script
    package: ClassVar[str] = "torch"  # that must be installed
    parallels: ClassVar[tuple[str, ...]] = ("ddp", "fsdp")
    hurts: ClassVar[tuple[str, ...]] = ("kill",)  # that it is measured under
    repeatable: ClassVar[bool] = True  # a hurt run is to end with the parameters of an unhurt one

    def __init__(self, path: Path, args: argparse.Namespace, steps: int | None = None) -> None:
        """With `steps` the script ends by itself after so many."""
        self.path = path
        self.args = args
        self.steps = steps
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.helpers: list[subprocess.Popen[bytes]] = []
        self.is_hurt = False
        self._lost: subprocess.Popen[bytes] | None = None  # the launcher of a node that was killed
        self._mark = uuid.uuid4().hex

    @classmethod
    def why_left_out(cls, args: argparse.Namespace) -> str | None:
        """Why it cannot be measured here, None if it can."""
        if importlib.util.find_spec(cls.package) is None:
            return f"{cls.package} is not installed"
        if args.parallel not in cls.parallels:
            return f"it has no {args.parallel.upper()} without data parallelism around it"
        if args.hurt not in cls.hurts:
            return f"it has nothing with its defaults that ends the wait after a {HURTS[args.hurt]} in minutes"
        return None

    @abstractmethod
    def commands(self) -> list[list[str]]:
        """The command of each launcher that makes up the job, without the script."""

    def prepare(self) -> None:
        """Make the folder, and what the launchers need before they start."""
        self.path.mkdir()

    def placed(self, index: int, command: list[str]) -> list[str]:
        """The command that runs this one, of the launcher of that number, where it belongs."""
        del index
        return command

    def environment(self, index: int) -> dict[str, str]:
        """What the launcher of that number has besides the benchmark's own environment."""
        del index
        return {}

    def stages(self, killed_at: float) -> dict[str, float]:
        """What else is known of the recovery, in seconds after the kill."""
        del killed_at
        return {}

    def source(self, killed_at: float) -> str:
        """What the run went on from after the kill, where the launcher says that."""
        del killed_at
        return ""

    def finished(self, rank: int) -> list[Finished]:
        """The steps that a rank finished together with all others."""
        return self.lines(rank)

    def counted_from(self, killed_at: float) -> float:
        """The time since when a finished step counts as one after the kill."""
        return killed_at

    @property
    def world_size(self) -> int:
        return int(self.args.nodes * self.args.ranks)

    def size_flags(self) -> list[str]:
        return ["--nnodes", str(self.args.nodes), "--nproc-per-node", str(self.args.ranks)]

    def script_flags(self) -> list[str]:
        names = ("parallel", "layers", "width", "batch", "length", "checkpoint_every")
        flags = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(self.args, name)))]
        steps = ["--steps", str(self.steps)] if self.steps is not None else []
        return ["--records", str(self.path), *flags, *steps]

    def spare_of(self, command: list[str]) -> list[str]:
        """The command of a launcher that waits for a node to be lost, by that of a node."""
        raise NotImplementedError(command)

    def start(self) -> None:
        self.prepare()
        commands = self.commands()
        for command in commands:
            self._start_node(command)
        if self.args.hurt in WITH_A_SPARE:
            # Not before: who comes first is a member.
            self.wait(lambda: all(map(self.lines, range(self.world_size))), "a first step of each rank")
            self._start_node(self.spare_of(commands[0]))
            time.sleep(SPARE_SECONDS)

    def _start_node(self, command: list[str]) -> None:
        script = [str(SCRIPTS / "small_gpt.py"), self.branch, *self.script_flags()]
        index = len(self.nodes)
        output = self.path / f"output-{index}.txt"
        self.nodes.append(self.popen(self.placed(index, [*command, *script]), output, self.environment(index)))

    def popen(self, command: list[str], output: Path, more: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "FTRAIN_BENCH_MARK": self._mark, "OMP_NUM_THREADS": "1", **(more or {})}
        with output.open("wb") as file:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    def lines(self, rank: int, kind: str = "rank") -> list[Finished]:
        """What the script wrote so far."""
        path = self.path / f"{kind}-{rank}"
        text = path.read_text() if path.exists() else ""
        words = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [Finished(float(at), int(step), int(pid)) for at, step, pid in words]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Raises `NotBackError` where that takes too long or a launcher ends, with the ends of what they printed."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            running = [node for node in self.nodes if node is not self._lost]
            ended = any(process.poll() is not None for process in (*running, *self.helpers))
            if ended or time.monotonic() > deadline:
                why = "a launcher ended before" if ended else f"waited {PATIENCE_SECONDS:.0f} s in vain for"
                raise NotBackError(f"{why} {what}; {self._tails()}")
            time.sleep(LOOK_SECONDS)

    def hurt_last_rank(self, phase: int, into: float = 0.5) -> Recovery:
        """Hurt the last rank in the step after the `phase`-th since a checkpoint; wait until every rank got further.

        `into` is how much of that step is over, from 0 to 1.
        """
        every = range(self.world_size)
        begun = time.time()
        self.wait(lambda: all(lines and lines[-1].at > begun for lines in map(self.lines, every)), "a step of all")
        settled_at = time.time() + SETTLE_SECONDS
        self.wait(lambda: time.time() > settled_at, f"{SETTLE_SECONDS} s of steps")
        newest = [self.lines(rank)[-1].step for rank in every]
        settled = min(newest) + SETTLE_STEPS
        aim = settled + (phase - settled - 1) % self.args.checkpoint_every
        self.wait(lambda: any(line.step >= aim for line in self.lines(0)), f"step {aim}")
        step_seconds = self._step_seconds()
        time.sleep(into * step_seconds)
        victim = self.lines(self.world_size - 1)[-1].pid
        killed_at = time.time()
        self._hurt(victim)
        lines = [line for rank in every for line in self.lines(rank)]
        furthest = max(line.step for line in lines if line.at <= killed_at)

        def first_beyond(step: int) -> list[list[Finished]]:
            """For each rank, what it finished with a number above `step`, once all were there again."""
            since = self.counted_from(killed_at)
            return [[done for done in self.finished(rank) if done.at > since and done.step > step] for rank in every]

        self.wait(lambda: all(first_beyond(furthest)), f"a step beyond {furthest} after the kill")
        again = first_beyond(-1)
        return Recovery(
            first_step_seconds=max(done[0].at for done in again) - killed_at,
            new_step_seconds=max(done[0].at for done in first_beyond(furthest)) - killed_at,
            redone_steps=max(0, furthest + 1 - again[-1][0].step),
            step_seconds=step_seconds,
            stages=self.stages(killed_at),
            source=self.source(killed_at),
        )

    def _step_seconds(self) -> float:
        """The median of the newest steps of rank 0."""
        ends = [line.at for line in self.lines(0)][-SETTLE_STEPS:]
        return statistics.median(b - a for a, b in itertools.pairwise(ends))

    def cut(self, index: int) -> None:
        """Cut the link of the launcher of that number."""
        raise NotImplementedError(index)

    def heal(self) -> None:
        """Undo the cut."""
        raise NotImplementedError

    def mend(self) -> None:
        """After a recovery: what was cut off takes the place of the spare that took its own."""
        if self.args.hurt in CUTS:
            self.heal()
            time.sleep(SPARE_SECONDS)

    def _hurt(self, victim: int) -> None:
        self.is_hurt = True
        if self.args.hurt in WITH_A_SPARE:
            above = {process.pid for process in psutil.Process(victim).parents()}
            index = next(index for index, node in enumerate(self.nodes) if node.pid in above)  # maybe the spare's
            if self.args.hurt in CUTS:
                self.cut(index)
                return
            self._lost = self.nodes[index]
            self._lost.kill()
        os.kill(victim, signal.SIGSTOP if self.args.hurt == "stop" else signal.SIGKILL)

    def final_parameters(self, patience_seconds: float = PATIENCE_SECONDS) -> list[str]:
        """The digests that the ranks leave at the end of a job with `steps`."""
        deadline = time.monotonic() + patience_seconds
        for node in self.nodes:
            try:
                status = node.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise NotBackError(f"waited {patience_seconds:.0f} s in vain for the end; {self._tails()}") from None
            if status != 0:
                raise NotBackError(f"a launcher ended with {status}; {self._tails()}")
        return [(self.path / f"parameters-{rank}").read_text() for rank in range(self.world_size)]

    def _tails(self) -> str:
        outputs = sorted(self.path.glob("output-*.txt"))
        return "the ends of the output:\n" + "\n".join(path.read_text(errors="replace")[-1500:] for path in outputs)

    def stop(self) -> None:
        """End everything that carries this job's mark, by its process id."""
        for process in (*self.nodes, *self.helpers):
            process.kill()
            process.wait()
        for _ in range(200):
            left = self._processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not left:
                return
            time.sleep(0.05)
        sys.exit(f"processes of {self.name} cannot be ended: {left}")

    def _processes(self) -> list[int]:
        mark = f"FTRAIN_BENCH_MARK={self._mark}".encode()
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (directory / "environ").read_bytes().split(b"\0"):
                    found.append(int(directory.name))
            except OSError:
                continue
        return found


def endpoint() -> str:
    return f"127.0.0.1:{free_port()}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
