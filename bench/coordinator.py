"""What one coordinator costs with many nodes: its processor time, and how long a node waits for an answer.

The coordinator is the real one, `ftrain coordinator` in a process of its own, reached over its mutual TLS. The nodes
are scripted, all in this process: they join, step together, send a heartbeat a second each, and answer whatever they
are asked as agents do, each for its ranks. No rank has a replica, so a snapshot is taken after each step, and sent on.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
from launchers.ftrain import FTRAIN
from launchers.job import endpoint

import ftrain
from ftrain.control.client import Client
from ftrain.control.secret import Secret
from ftrain.core import messages as m
from ftrain.core.page import Phase
from ftrain.errors import FtrainError

COPY_SECONDS = 0.2  # until a snapshot has come to the keeper of a node
SETTLE_SECONDS = 5.0
PATIENCE_SECONDS = 300.0
COLUMNS = (
    "nodes x ranks",
    "all joined",
    "snapshots",
    "coordinator, of a core",
    "resident",
    "a heartbeat's answer, median",
    "99 %",
    "slowest",
)


class Run:
    """What all nodes share: when it began, and who they are."""

    def __init__(self, step_seconds: float, ranks: int) -> None:
        self.step_seconds = step_seconds
        self.ranks = ranks
        self.nodes: list[Node] = []
        self.by_place: dict[int, Node] = {}
        self.began = float("inf")
        self.waits: list[float] = []  # from a heartbeat to its answer
        self.snapshots = 0

    @property
    def step(self) -> int:
        return int(max(0.0, time.monotonic() - self.began) / self.step_seconds)

    def at(self, step: int) -> float:
        """Seconds from now until `step` is done."""
        return max(0.0, self.began + step * self.step_seconds - time.monotonic())


class Node:
    """One agent with its ranks, as far as the coordinator sees it."""

    def __init__(self, run: Run, number: int, address: str, secret: Secret) -> None:
        self.name = f"node-{number:04d}"
        self.client = Client(address, secret)
        self.start: m.Start | None = None
        self._run = run
        self._version = 0
        self._beat = 0
        self._sent: dict[int, float] = {}
        self._held: list[m.Attempt] = []
        self.keeps: tuple[m.Kept, ...] = ()

    def hello(self) -> m.Hello:
        return m.Hello(
            node=self.name,
            node_rank=-1,
            processes=self._run.ranks,
            address="127.0.0.1",
            host=self.name,
            pid=1,
            run_id="bench",
            job_sha256="job",
            version=ftrain.__version__,
            term_seen=0,
            report=self.report(),
            joins=True,
            peer_port=1,
        )

    def report(self) -> m.Report:
        self._version += 1
        start = self.start
        if start is None:
            return m.Report(self._version)
        step = self._run.step
        progress = m.Progress(100 * step + 7, 3, 100 * step, 0.1, 0.1, False, self._run.step_seconds, 1.0)
        ranks = tuple(
            m.RunningRank(
                rank=start.first_rank + local,
                local_rank=local,
                pid=4000 + local,
                step=step,
                phase=Phase.STEP,
                joined=True,
                looped=True,
                shard=f"{start.group_rank}.{local}",
                progress=progress,
                slots=3,
            )
            for local in range(self._run.ranks)
        )
        return m.Report(
            version=self._version,
            generation=start.generation,
            stopped=False,
            ranks=ranks,
            looping=True,
            first_step=0,
            held=tuple(self._held[-2:]),
            keeps=self.keeps,
        )

    def heard(self, message: m.FromCoordinator) -> None:
        loop = asyncio.get_running_loop()
        match message:
            case m.Prepare(generation=generation):
                self.client.send(m.StoreReady(generation, "127.0.0.1", 29400))
            case m.Start():
                self.start = message
                self._run.by_place[message.group_rank] = self
                if len(self._run.by_place) == len(self._run.nodes):
                    self._run.began = time.monotonic()
                self.client.send(m.Changed(self.report()))
            case m.Heard(sequence=sequence):
                self._run.waits.append(time.monotonic() - self._sent.pop(sequence))
            case m.Arm(attempt=attempt):
                step = self._run.step
                self.client.send(m.ArmReply(attempt, step < attempt.step, step))
                if step < attempt.step:
                    loop.call_later(self._run.at(attempt.step), self._sealed, message)
            case m.Copy(attempt=attempt):
                loop.call_later(COPY_SECONDS, self._copied, attempt)

    def beat(self) -> None:
        self._beat += 1
        self._sent[self._beat] = time.monotonic()
        self.client.send(m.Heartbeat(self._beat, self.report()))

    @property
    def _ranks(self) -> range:
        assert self.start is not None
        return range(self.start.first_rank, self.start.first_rank + self._run.ranks)

    def _sealed(self, arm: m.Arm) -> None:
        self._held.append(arm.attempt)
        self._run.snapshots += self.start is not None and self.start.group_rank == 0
        self.client.send(m.Sealed(arm.attempt, tuple(self._ranks), 0.001, 0.05))

    def _copied(self, attempt: m.Attempt) -> None:
        assert self.start is not None
        keeper = self._run.by_place[(self.start.group_rank + 1) % len(self._run.nodes)]
        keeper.keeps = tuple(
            m.Kept(rank, (), (attempt,), f"{self.start.group_rank}.{local}") for local, rank in enumerate(self._ranks)
        )
        keeper.client.send(m.Changed(keeper.report()))


def measure(count: int, args: argparse.Namespace, directory: Path) -> str:
    """A row of the table, for so many nodes."""
    address = endpoint()
    secret = Secret.create(directory / "secret")
    command = [
        *(*FTRAIN, "coordinator", "--run-dir", str(directory / "run")),
        *("--secret", str(directory / "secret"), "--rdzv-endpoint", address, "--rdzv-id", "bench"),
        *("--nnodes", str(count), "--checkpoint-every", "off"),
    ]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not _listens(address):
            if process.poll() is not None:
                raise SystemExit(f"the coordinator ended: {(directory / 'log').read_text()}")
            time.sleep(0.05)
        return asyncio.run(_measured(psutil.Process(process.pid), count, args, address, secret))
    finally:
        process.terminate()
        process.wait(30)


async def _measured(
    coordinator: psutil.Process, count: int, args: argparse.Namespace, address: str, secret: Secret
) -> str:
    run = Run(args.step_seconds, args.ranks)
    run.nodes = [Node(run, number, address, secret) for number in range(count)]
    began = time.monotonic()
    tasks = [asyncio.create_task(node.client.run(node.hello, node.heard, _state)) for node in run.nodes]
    while len(run.by_place) < count:
        if time.monotonic() > began + PATIENCE_SECONDS:
            raise SystemExit(f"only {len(run.by_place)} of {count} nodes were started")
        await asyncio.sleep(0.05)
    joined = time.monotonic() - began
    tasks += [asyncio.create_task(_beat(node, number / count)) for number, node in enumerate(run.nodes)]
    await asyncio.sleep(SETTLE_SECONDS)
    run.waits.clear()
    snapshots, since, used = run.snapshots, time.monotonic(), sum(coordinator.cpu_times()[:2])
    await asyncio.sleep(args.seconds)
    share = (sum(coordinator.cpu_times()[:2]) - used) / (time.monotonic() - since)
    waits = sorted(run.waits)
    columns = (
        f"{count} x {args.ranks}",
        f"{joined:.1f} s",
        str(run.snapshots - snapshots),
        f"{share:.0%}",
        f"{coordinator.memory_info().rss >> 20} MiB",
        f"{statistics.median(waits) * 1000:.1f} ms",
        f"{waits[int(len(waits) * 0.99)]:.2f} s",
        f"{waits[-1]:.2f} s",
    )
    for node in run.nodes:
        node.client.stop()
    for task in tasks[count:]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return f"| {' | '.join(columns)} |"


async def _beat(node: Node, after: float) -> None:
    await asyncio.sleep(after)
    while True:
        node.beat()
        await asyncio.sleep(1.0)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def _state(error: FtrainError | None) -> None:
    if error is not None:
        print(f"a node: {error}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--ranks", type=int, default=8, help="of each node")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--step-seconds", type=float, default=1.0)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), load {os.getloadavg()[0]:.1f}"
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine}, {args.seconds:g} s each")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for count in args.nodes:
        with tempfile.TemporaryDirectory(prefix="ftrain-bench-") as directory:
            print(measure(count, args, Path(directory)), flush=True)


if __name__ == "__main__":
    main()
