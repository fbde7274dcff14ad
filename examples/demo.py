"""The demo: train a GPT on two nodes of two ranks, hurt it four times, and end with the very same parameters.

Each "node" is a launcher of its own on this machine; they share nothing but a directory and a secret, as real nodes
would. First the job runs unhurt. Then it runs again, and on the way
  1. a rank is SIGKILLed in the middle of a step,
  2. a rank is SIGKILLed in the middle of a checkpoint,
  3. node 1's launcher is SIGKILLed, and a new one takes its place,
  4. node 0's launcher, which hosts the coordinator, is SIGKILLed, and a new one takes its place.
The two runs print one digest each over all parameters and optimizer state: they must be equal, bit for bit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ftrain.control.client import fetch_status
from ftrain.control.secret import Secret
from ftrain.errors import FtrainError

SCRIPT = Path(__file__).with_name("train_gpt.py")
NODES, RANKS_PER_NODE = 2, 2
console = Console(highlight=False, soft_wrap=True)
started = time.monotonic()


def say(text: str) -> None:
    console.print(f"[dim]{time.monotonic() - started:6.1f} s[/]  {text}")


def quote(line: str) -> None:
    """What a launcher said, as it said it."""
    console.print(Text(f"{time.monotonic() - started:6.1f} s     {line}", style="cyan"))


@dataclass
class Job:
    """One run of two launchers, its coordinator's status, and its digest at the end."""

    name: str
    root: Path
    arguments: list[str]
    port: int = 0
    launchers: list[subprocess.Popen[str]] = field(default_factory=list)
    readers: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root.mkdir()
        self.secret_path = self.root / "secret.pem"
        self.secret = Secret.create(self.secret_path)
        self.run_dir = self.root / "run"
        self.digest_path = self.root / "digest"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.launchers = [self.launch(rank) for rank in range(NODES)]

    def launch(self, node_rank: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ftrain.cli.main", "launch"]
        command += ["--nnodes", str(NODES), "--node-rank", str(node_rank), "--nproc-per-node", str(RANKS_PER_NODE)]
        command += ["--rdzv-endpoint", f"127.0.0.1:{self.port}", "--secret", str(self.secret_path)]
        command += ["--run-dir", str(self.run_dir), "--checkpoint-every", "5", "--redirects", "3"]
        command += [str(SCRIPT), *self.arguments, "--digest", str(self.digest_path)]
        launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        reader = threading.Thread(target=self.read, args=(launcher,))
        reader.start()
        self.readers.append(reader)
        return launcher

    def read(self, launcher: subprocess.Popen[str]) -> None:
        assert launcher.stderr is not None
        for line in launcher.stderr:
            quote(line.rstrip()[9:])

    def status(self) -> dict[str, Any]:
        try:
            return asyncio.run(fetch_status(f"127.0.0.1:{self.port}", self.secret))
        except FtrainError:
            return {"phase": "no coordinator", "generation": 0, "step": -1, "nodes": [], "attempt": None, "commits": []}

    def wait_for(self, what: str, condition: Callable[[dict[str, Any]], Any], seconds: float = 120) -> Any:
        """The first true answer of `condition(status)`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := condition(self.status()):
                return found
            if all(launcher.poll() is not None for launcher in self.launchers):
                raise SystemExit(f"demo: the run ended while we waited for {what}")
            time.sleep(0.02)
        raise SystemExit(f"demo: waited {seconds:.0f} s in vain for {what}")

    def finish(self) -> str:
        """Wait for the end, and return the digest."""
        codes = [launcher.wait() for launcher in self.launchers]
        for reader in self.readers:
            reader.join()
        if any(codes):
            raise SystemExit(f"demo: the launchers of the {self.name} run ended with {codes}")
        return self.digest_path.read_text().strip()

    def stop(self) -> None:
        for launcher in self.launchers:
            if launcher.poll() is None:
                launcher.terminate()
        for launcher in self.launchers:
            launcher.wait()


def rank_pid(status: dict[str, Any], rank: int) -> int:
    return next((one["pid"] for node in status["nodes"] for one in node["ranks"] if one["rank"] == rank), 0)


def looping(status: dict[str, Any], beyond: int) -> bool:
    """All ranks are in their loop and have finished more than `beyond` steps."""
    ranks = [one for node in status["nodes"] for one in node["ranks"]]
    return len(ranks) == NODES * RANKS_PER_NODE and all(one["step"] > beyond for one in ranks)


def attempts(run_dir: Path) -> set[str]:
    """The checkpoints that are there, or are being written."""
    found = set()
    for step in os.listdir(run_dir / "checkpoints"):
        with contextlib.suppress(FileNotFoundError):  # an old one is being removed just now
            found |= {f"{step}/{attempt}" for attempt in os.listdir(run_dir / "checkpoints" / step)}
    return found


def hurt(job: Job) -> list[tuple[str, float]]:
    """The four injuries. Returns each with the seconds from the kill to the next new step on all ranks."""
    times = []

    def recovered(what: str, killed_at: float, was: int, generation: int) -> None:
        job.wait_for(
            f"recovery from {what}",
            lambda status: status["generation"] > generation and looping(status, was),
        )
        took = time.monotonic() - killed_at
        times.append((what, took))
        say(f"[green]all ranks are past step {was} again, {took:.1f} s after the kill[/]\n")

    def kill_rank(what: str, rank: int, status: dict[str, Any]) -> None:
        say(f"[bold red]SIGKILL[/] to rank {rank} (pid {rank_pid(status, rank)}), {what}")
        os.kill(rank_pid(status, rank), signal.SIGKILL)
        recovered(f"rank {rank} killed {what}", time.monotonic(), status["step"], status["generation"])

    status = job.wait_for("the first commit", lambda s: s if s["commits"] and looping(s, 7) else None)
    kill_rank("in the middle of a step", 3, status)

    before = attempts(job.run_dir)
    while not (new := attempts(job.run_dir) - before):
        time.sleep(0.001)
    kill_rank(f"while {new.pop()} is being written", 1, job.status())

    for node_rank, what in ((1, "node 1's launcher"), (0, "node 0's launcher, the coordinator's home")):
        beyond = job.status()["commits"][-1]["step"]
        status = job.wait_for("the next steps", lambda s, beyond=beyond: s if looping(s, beyond) else None)
        launcher = job.launchers[node_rank]
        say(f"[bold red]SIGKILL[/] to {what} (pid {launcher.pid}); a new one is started one second later")
        launcher.kill()
        killed_at = time.monotonic()
        launcher.wait()
        time.sleep(1)
        job.launchers[node_rank] = job.launch(node_rank)
        recovered(f"{what} killed", killed_at, status["step"], status["generation"])
    return times


def compare(parallel: str, root: Path, steps: int) -> bool:
    arguments = ["--parallel", parallel, "--steps", str(steps), "--layers", "2", "--width", "128", "--heads", "4"]
    say(f"[bold]{parallel.upper()}: the unhurt run[/]  {NODES} nodes x {RANKS_PER_NODE} ranks, {steps} steps")
    unhurt_job = Job("unhurt", root / f"{parallel}-unhurt", arguments)
    try:
        unhurt = unhurt_job.finish()
    finally:
        unhurt_job.stop()
    say(f"digest {unhurt}\n")
    say(f"[bold]{parallel.upper()}: the same again, hurt four times[/]")
    job = Job("hurt", root / f"{parallel}-hurt", arguments)
    try:
        times = hurt(job)
        digest = job.finish()
    finally:
        job.stop()
    say(f"digest {digest}\n")
    for what, took in times:
        say(f"{took:5.1f} s  {what}")
    if digest == unhurt:
        say(f"[bold green]{parallel.upper()}: equal. The hurt run ended bit for bit where the unhurt one did.[/]\n")
    else:
        say(f"[bold red]{parallel.upper()}: NOT equal.[/]\n")
    return digest == unhurt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "both"), default="both")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    kinds = ("ddp", "fsdp") if args.parallel == "both" else (args.parallel,)
    with tempfile.TemporaryDirectory(prefix="ftrain-demo-") as root:
        equal = [compare(kind, Path(root), args.steps) for kind in kinds]
    raise SystemExit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()
