"""A real run that is hurt again and again, by a seed: which rank or node, how, and after how many steps."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.launching.harness import Cluster, Launcher, free_port, wait_for
from tests.recovery.account import Job, arguments

STEPS_PER_FAULT = 4  # at least so many are done between two, on average
PATIENCE_SECONDS = 120.0
# How often each kind strikes, beside the others.
KINDS = {
    "kill a rank": 8,
    "kill a rank, and another while it recovers": 3,
    "kill two ranks at once": 1,
    "stop a rank": 1,
    "kill a node": 1,
    "kill the coordinator's node": 1,
}


@dataclass(frozen=True)
class Held:
    """What one process holds."""

    descriptors: int
    threads: int
    resident_mib: float


@dataclass
class Chaos:
    """One run of `nodes` x `ranks` and its faults. `spared` is a rank that is never hurt itself, -1 for none."""

    cluster: Cluster
    seed: int
    faults: int
    parallel: str = "ddp"
    nodes: int = 2
    ranks: int = 2
    kinds: tuple[str, ...] = tuple(KINDS)
    spared: int = -1
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.job = Job(self.cluster.path / "chaos")
        self._rng = Random(self.seed)
        self._port = free_port()
        self._secret = self.cluster.path / "secret.pem"
        self._launchers: list[Launcher] = []

    def run(self, sample: Callable[[int], None] = lambda _: None) -> None:
        """All faults, then to the end. `sample` is called after each fault with their number. Raises where it hangs."""
        command = [sys.executable, "-m", "ftrain.cli.main", "secret", str(self._secret)]
        assert self.cluster.start(command).wait() == 0
        self._launchers = [self._start(node) for node in range(self.nodes)]
        for number in range(self.faults):
            self._wait_for_steps(self._newest() + self._rng.randint(1, 2 * STEPS_PER_FAULT - 3))
            if self._newest() >= self.steps - STEPS_PER_FAULT:
                break
            kind = self._rng.choices(self.kinds, [KINDS[one] for one in self.kinds])[0]
            self._strike(kind)
            self.done[kind] += 1
            sample(number + 1)
        codes = [launcher.wait(PATIENCE_SECONDS) for launcher in self._launchers]
        assert set(codes) == {0}, self.told()

    @property
    def steps(self) -> int:
        return self.faults * STEPS_PER_FAULT + 20

    def told(self) -> str:
        return "\n".join(launcher.text[-4000:] for launcher in self._launchers)

    def pid(self, rank: int) -> int:
        """Of the process that finished this rank's newest step; 0 before the first."""
        files = sorted(self.job.out.glob(f"steps-*-r{rank}.jsonl"), key=lambda path: path.stat().st_mtime)
        for path in reversed(files):
            if line := _last_line(path):
                return int(json.loads(line)["pid"])
        return 0

    def held(self) -> dict[str, Held]:
        """What the spared rank and the launchers hold now."""
        pids = {f"launcher {node}": launcher.process.pid for node, launcher in enumerate(self._launchers)}
        if self.spared >= 0:
            pids[f"rank {self.spared}"] = self.pid(self.spared)
        return {name: _held(pid) for name, pid in pids.items()}

    def _start(self, node: int) -> Launcher:
        flags = ["--nproc-per-node", self.ranks, "--checkpoint-every", 25, "--snapshot-every", 2, "--lease", "5s"]
        if self.nodes > 1:
            flags += ["--nnodes", self.nodes, "--node-rank", node, "--rdzv-endpoint", f"127.0.0.1:{self._port}"]
            flags += ["--secret", self._secret]
        script = arguments(self.job, self.parallel, self.steps, "--pause", 0.01, "--norm", "layer")
        return self.cluster.launch(*flags, *script)

    def _newest(self) -> int:
        """Steps that rank 0 has finished, or whichever rank was last to say so."""
        newest = 0
        for rank in range(self.nodes * self.ranks):
            files = sorted(self.job.out.glob(f"steps-*-r{rank}.jsonl"), key=lambda path: path.stat().st_mtime)
            lines = [line for path in files[-1:] if (line := _last_line(path))]
            newest = max([newest, *(int(json.loads(line)["step"]) + 1 for line in lines)])
        return newest

    def _wait_for_steps(self, step: int) -> None:
        def there() -> bool:
            for launcher in self._launchers:
                assert launcher.process.poll() in (None, 0), self.told()
            return self._newest() >= min(step, self.steps)

        wait_for(there, f"step {step}; the ends of what was told:\n{self.told()}", PATIENCE_SECONDS)

    def _victims(self, count: int) -> list[int]:
        ranks = [rank for rank in range(self.nodes * self.ranks) if rank != self.spared]
        return self._rng.sample(ranks, min(count, len(ranks)))

    def _strike(self, kind: str) -> None:
        match kind:
            case "kill a rank":
                self._signal(self._victims(1)[0], signal.SIGKILL)
            case "kill two ranks at once":
                for rank in self._victims(2):
                    self._signal(rank, signal.SIGKILL)
            case "kill a rank, and another while it recovers":
                first, *others = self._victims(2)
                self._signal(first, signal.SIGKILL)
                time.sleep(self._rng.uniform(0.0, 0.4))
                for rank in others:
                    self._signal(rank, signal.SIGKILL)
            case "stop a rank":
                self._signal(self._victims(1)[0], signal.SIGSTOP)
            case "kill a node" | "kill the coordinator's node":
                node = 0 if self.nodes == 1 or "coordinator" in kind else self._rng.randrange(1, self.nodes)
                self._launchers[node].process.kill()
                self._launchers[node].wait()
                self._launchers[node] = self._start(node)

    def _signal(self, rank: int, number: signal.Signals) -> None:
        if pid := self.pid(rank):
            # It may have died of the fault before, and its successor has finished no step yet.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _last_line(path: Path) -> str:
    lines = path.read_bytes()[-4096:].decode().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n") and line.startswith("{")]
    return whole[-1] if whole else ""


def _held(pid: int) -> Held:
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    threads = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads:"))
    return Held(len(os.listdir(f"/proc/{pid}/fd")), threads, resident / 1024)
