"""Starts real launchers for tests, and makes sure that nothing of them is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

FTRAIN = [sys.executable, "-m", "ftrain.cli.main"]
PATIENCE_SECONDS = 240.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def wait_for(condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> object:
    """The first true answer. The wait is for an event; the bound only turns a hang into a message."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.02)
    return found


@dataclass
class Launcher:
    process: subprocess.Popen[bytes]
    output: Path

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the launcher did not end:\n{self.text}") from None

    def says(self, mark: str) -> None:
        """Wait until the output has `mark`."""
        wait_for(lambda: mark in self.text or self._ended(mark), f"{mark!r} in\n{self.text}")

    def _ended(self, mark: str) -> bool:
        if self.process.poll() is not None and mark not in self.text:
            raise AssertionError(f"the launcher ended with {self.process.returncode} without {mark!r}:\n{self.text}")
        return False


@dataclass
class Cluster:
    """The launchers of one test, below `path`. Every process that they start carries the cluster's mark."""

    path: Path
    mark: str = field(default_factory=lambda: f"FTRAIN_TEST_MARK={uuid.uuid4().hex}")
    launchers: list[Launcher] = field(default_factory=list)

    def script(self, source: str, name: str = "script.py") -> Path:
        path = self.path / name
        path.write_text(textwrap.dedent(source))
        return path

    def launch(self, *arguments: object, environment: dict[str, str] | None = None) -> Launcher:
        return self.start([*FTRAIN, "launch", *map(str, arguments)], environment)

    def start(self, command: list[str], environment: dict[str, str] | None = None) -> Launcher:
        output = self.path / f"output-{len(self.launchers)}.txt"
        name, _, value = self.mark.partition("=")
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.path,
                env={**os.environ, name: value, **(environment or {})},
            )
        launcher = Launcher(process, output)
        self.launchers.append(launcher)
        return launcher

    def processes(self) -> dict[int, str]:
        """All living processes that this test's launchers started, however they were detached since."""
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (directory / "environ").read_bytes().split(b"\0"):
                    state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
                    if state not in "ZX":
                        found[int(directory.name)] = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, IndexError):
                continue
        return found

    def nothing_left(self) -> bool:
        # Looked at twice: in the moment of its exec a process shows no environment.
        wait_for(lambda: not (self.processes() or self.processes()), f"the end of {self.processes()}", 60)
        return True

    def close(self) -> None:
        for launcher in self.launchers:
            if launcher.process.poll() is None:
                launcher.process.kill()
                launcher.process.wait()
        deadline = time.monotonic() + 30
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"processes were left behind: {left}"


def clusters(path: Path) -> Iterator[Cluster]:
    cluster = Cluster(path)
    try:
        yield cluster
    finally:
        cluster.close()
