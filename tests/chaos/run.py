"""A real run that is hurt again and again, as its plan says, and what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ftrain.agent import proc
from ftrain.core.local import STACK_SIGNAL
from tests.chaos.disk import Disk
from tests.chaos.link import Link
from tests.chaos.plan import KINDS, STEPS_PER_FAULT, Fault, Shape, plan
from tests.launching.harness import FTRAIN, Cluster, Launcher, free_port
from tests.recovery.account import Job, arguments, launch

PATIENCE_SECONDS = 300.0
LOOK_SECONDS = 0.05
FLAGS = ("--checkpoint-every", 25, "--snapshot-every", 2)
RESTARTS = 1_000_000  # the run is hurt faster than it commits: it is not to give up over that


class Stalled(AssertionError):
    """The run does not come on, or ended otherwise than it was to."""


@dataclass
class Chaos:
    """One run and its faults: those of the seed's plan, of these kinds. `sample` is called after each with its number.

    `done` counts what was really hurt: a fault whose victim was not there at that moment is none.
    """

    cluster: Cluster
    seed: int
    faults: int
    parallel: str = "ddp"
    shape: Shape = Shape()
    kinds: tuple[str, ...] = tuple(KINDS)
    steps_per_fault: int = STEPS_PER_FAULT
    environment: dict[str, str] = field(default_factory=dict)  # of the nodes, beside this process's
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._port = free_port()
        self._secret = self.cluster.path / "secret.pem"
        self._launchers: list[Launcher] = []  # the nodes'
        self._coordinator: Launcher | None = None
        self._links: dict[int, Link] = {}
        self._later: list[threading.Thread] = []
        self._disk = Disk(self.cluster.path) if self.shape.disk else None
        self.job = Job(self.cluster.path / "chaos")
        self.job.path.mkdir()
        if self._disk is not None:
            (self._disk.root / "run").mkdir()
            self.job.run_dir.symlink_to(self._disk.root / "run")

    def run(self, sample: Callable[[int], None] = lambda _: None) -> None:
        """All faults, then to the end. Raises `Stalled`."""
        subprocess.run([*FTRAIN, "secret", str(self._secret)], check=True, capture_output=True)
        try:
            self._links = {node: Link(self._port) for node in range(1, self.shape.nodes)}
            if self.shape.alone:
                self._coordinator = self._coordinate()
                self._coordinator.says("serving run")  # else node 0, if it is faster, serves there itself
            self._launchers = [self._start(node) for node in range(self.shape.nodes)]
            for number, fault in enumerate(plan(self.seed, self.faults, self.shape, self.kinds), 1):
                if fault.steps:
                    self._wait_for_steps(self._newest() + fault.steps)
                else:
                    time.sleep(fault.after_seconds)
                if self._newest() >= self.steps - self.steps_per_fault:
                    break
                self._strike(fault)
                sample(number)
            self._wait_for_steps(self.steps)
            self._end()
        finally:
            self.close()

    @property
    def steps(self) -> int:
        return self.faults * self.steps_per_fault + 20

    def close(self) -> None:
        """Undo what was done to the machine."""
        self._heal()
        for launcher in (*self._launchers, self._coordinator):
            if launcher is not None and launcher.process.poll() is None:
                launcher.process.send_signal(signal.SIGCONT)
                launcher.process.kill()
                launcher.process.wait()
        for link in self._links.values():
            link.close()
        self._links.clear()
        if self._disk is not None:
            self.cluster.nothing_left()  # else it is busy
            home = self.job.run_dir
            home.unlink()
            shutil.copytree(self._disk.root / "run", home)
            self._disk.close()
            self._disk = None

    def pid(self, rank: int) -> int:
        """Of the process that is this rank now, whatever it is doing; 0 where there is none."""
        for launcher in self._launchers:
            for nursery in proc.children(launcher.process.pid):
                for pid in proc.children(nursery):
                    with contextlib.suppress(OSError):
                        if any(_is_page(path, rank) for path in Path(f"/proc/{pid}/fd").iterdir()):
                            return pid
        return 0

    def pids(self) -> dict[str, int]:
        """Of the launchers, and of the coordinator by itself and the spared rank where there is one."""
        found = {f"launcher {node}": launcher.process.pid for node, launcher in enumerate(self._launchers)}
        if self._coordinator is not None:
            found["coordinator"] = self._coordinator.process.pid
        if self.shape.spared >= 0:
            found[f"rank {self.shape.spared}"] = self.pid(self.shape.spared)
        return found

    def told(self) -> str:
        """The ends of what was told, what `ftrain status` says, and where each worker is."""
        parts = [f"== node {node}\n{one.text[-3000:]}" for node, one in enumerate(self._launchers)]
        command = [*FTRAIN, "status", str(self.job.run_dir), "--secret", str(self._secret), "--json"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            parts.append(subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout[:6000])
        for rank in range(self.shape.world_size):
            if pid := self.pid(rank):
                os.kill(pid, STACK_SIGNAL)
                time.sleep(0.3)
                logs = sorted(self.job.run_dir.glob(f"logs/generation-*/rank-{rank}/stderr.log"))
                parts.append(f"== rank {rank}, pid {pid}\n{logs[-1].read_text()[-3000:] if logs else ''}")
        return "\n".join(parts)

    # ----------------------------------------------------------------------------------------------------- processes

    def _shared(self) -> list[object]:
        where = f"127.0.0.1:{self._port}"
        flags: list[object] = ["--run-dir", self.job.run_dir, "--lease", f"{self.shape.lease_seconds:g}s"]
        if self.shape.nodes > 1 or self.shape.alone:
            flags += ["--nnodes", self.shape.nodes, "--rdzv-endpoint", where, "--secret", self._secret]
        return [*flags, "--max-restarts", RESTARTS]

    def _coordinate(self) -> Launcher:
        return self.cluster.start([*FTRAIN, "coordinator", *map(str, (*self._shared(), *FLAGS))])

    def _start(self, node: int) -> Launcher:
        flags = [*self._shared(), "--nproc-per-node", self.shape.ranks, *FLAGS]
        if self.shape.nodes > 1 or self.shape.alone:
            flags += ["--node-rank", node]
        if node in self._links:
            flags += ["--rdzv-endpoint", f"127.0.0.1:{self._links[node].port}"]
        script = arguments(self.job, self.parallel, self.steps, "--pause", 0.01, "--norm", "layer")
        return self.cluster.launch(*flags, *script[2:], environment=self.environment)

    def _end(self) -> None:
        self._heal()
        for launcher in (*self._launchers, self._coordinator):
            if launcher is not None:
                try:
                    code = launcher.process.wait(PATIENCE_SECONDS)
                except subprocess.TimeoutExpired:
                    raise Stalled(f"it does not end\n{self.told()}") from None
                if code:
                    raise Stalled(f"it ended with {code}\n{self.told()}")

    # -------------------------------------------------------------------------------------------------------- steps

    def _newest(self) -> int:
        """Steps that whichever rank is furthest has finished."""
        newest: dict[str, list[str]] = {}
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self.job.out), reverse=True):
                newest.setdefault(name.rpartition("-r")[2], []).append(name)
        found = 0
        for names in newest.values():
            # The newest process of a rank may not have finished a step yet.
            lines = (line for name in names[:3] if (line := _last_line(self.job.out / name)))
            found = max(found, int(json.loads(next(lines, '{"step": -1}'))["step"]) + 1)
        return found

    def _wait_for_steps(self, step: int) -> None:
        newest = self._newest()
        since = time.monotonic()
        while newest < min(step, self.steps):
            for launcher in self._launchers:
                if launcher.process.poll() not in (None, 0):
                    raise Stalled(f"a launcher ended with {launcher.process.returncode}\n{self.told()}")
            before, newest = newest, self._newest()
            if newest > before:
                since = time.monotonic()
            elif time.monotonic() > since + PATIENCE_SECONDS:
                raise Stalled(f"no new step after {newest} for {PATIENCE_SECONDS:.0f} s\n{self.told()}")
            time.sleep(LOOK_SECONDS)

    # ------------------------------------------------------------------------------------------------------- faults

    def _strike(self, fault: Fault) -> None:
        if self._does(fault):
            self.done[fault.name] += KINDS[fault.kind].faults

    def _does(self, fault: Fault) -> bool:
        """Whether there was anything to be hurt."""
        match fault.kind:
            case "kill a rank" | "kill two ranks at once" | "kill all ranks":
                count = {"kill a rank": 1, "kill two ranks at once": 2}.get(fault.kind, len(fault.ranks))
                return sum(_send(self.pid(rank), signal.SIGKILL) for rank in fault.ranks[:count]) > 0
            case "stop a rank":
                return _send(self.pid(fault.ranks[0]), signal.SIGSTOP)
            case "kill a nursery":
                nurseries = proc.children(self._launchers[fault.node].process.pid)
                return _send(nurseries[0] if nurseries else 0, signal.SIGKILL)
            case "kill a node" | "kill the coordinator's node":
                node = 0 if "coordinator" in fault.kind else fault.node
                self._kill(self._launchers[node])
                self._launchers[node] = self._start(node)
            case "kill the coordinator":
                assert self._coordinator is not None
                self._kill(self._coordinator)
                self._coordinator = self._coordinate()
            case "stop an agent" | "stop an agent past its lease":
                return self._stop(self._launchers[fault.node], fault.seconds)
            case "stop the coordinator" | "stop the coordinator past the lease":
                assert self._coordinator is not None
                return self._stop(self._coordinator, fault.seconds)
            case "break a link":
                self._links[fault.node].break_all()
            case "full disk":
                assert self._disk is not None
                self._disk.fill()
                self._after(fault.seconds, self._disk.empty)
            case "slow disk":
                assert self._disk is not None
                return self._disk.freeze(fault.seconds)
            case _:
                assert fault.kind.startswith("cut a link"), fault.kind
                link, one_way = self._links[fault.node], "one way" in fault.kind
                link.cut(fault.to_node or not one_way, not fault.to_node or not one_way)
                self._after(fault.seconds, link.heal)
        return True

    def _kill(self, launcher: Launcher) -> None:
        launcher.process.kill()
        launcher.process.wait()

    def _stop(self, launcher: Launcher, seconds: float) -> bool:
        if launcher.process.poll() is not None:
            return False
        launcher.process.send_signal(signal.SIGSTOP)
        self._after(seconds, lambda: launcher.process.send_signal(signal.SIGCONT))
        return True

    def _after(self, seconds: float, undo: Callable[[], None]) -> None:
        """Undo it in time, whatever else strikes meanwhile."""

        def wait() -> None:
            time.sleep(seconds)
            undo()

        self._later.append(threading.Thread(target=wait, name="chaos-later"))
        self._later[-1].start()

    def _heal(self) -> None:
        """Wait until nothing is hurt any more."""
        for thread in self._later:
            thread.join()
        self._later.clear()
        if self._disk is not None:
            self._disk.thawed()


def ends_as_unhurt(chaos: Chaos) -> bool:
    """Whether the run ended, bit for bit, as a run of as many ranks that nothing happened to."""
    cluster = chaos.cluster
    unhurt = Job(cluster.path / "unhurt")
    more = ("--pause", 0, "--norm", "layer")
    ranks = chaos.shape.world_size
    reference = launch(cluster, unhurt, chaos.parallel, ranks=ranks, every="off", steps=chaos.steps, more=more)
    assert reference.wait(3600) == 0, reference.text
    return chaos.job.history() == unhurt.history() and chaos.job.end() == unhurt.end()


def _send(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number) if pid else None
    except ProcessLookupError:
        return False
    return bool(pid)


def _is_page(path: Path, rank: int) -> bool:
    return str(path.readlink()).partition(" ")[0] == f"/memfd:ftrain-page-{rank}"


def _last_line(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        lines = file.read().decode().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n") and line.startswith("{")]
        return whole[-1] if whole else ""
    return ""
