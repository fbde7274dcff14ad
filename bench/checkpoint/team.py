"""The process tree: a process per rank of each subject, that is told what to do by lines and ends with us."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

CHILD = Path(__file__).parent / "child.py"
LEAD_SECONDS = 0.05  # from telling the ranks when to begin until they begin
START_SECONDS_MAX = 120.0


class FailedError(Exception):
    """A subject could not do what it was told, or took too long."""


@dataclass(frozen=True)
class Timing:
    """Wall time of all ranks together, processor time of all ranks added."""

    seconds: float
    cpu_seconds: float


class Team:
    """All ranks of one subject. They are started when they are first needed, and again after a failure."""

    def __init__(self, name: str, ranks: int, log: Path, bound_seconds: float) -> None:
        self.name = name
        self.ranks = ranks
        self._log = log
        self._bound_seconds = bound_seconds
        self._children: list[Child] = []

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """What each rank answers to a command. Raises FailedError, and then none of the ranks runs any more."""
        return self._together(do, arguments, False)

    def time(self, do: str, **arguments: Any) -> Timing:
        """What a command takes that all ranks begin together: from the first one's begin to the last one's end."""
        answers = self._together(do, arguments, True)
        wall = max(answer["ended"] for answer in answers) - min(answer["began"] for answer in answers)
        return Timing(wall, sum(answer["cpu_seconds"] for answer in answers))

    def stop(self) -> None:
        for child in self._children:
            child.kill()
        self._children = []

    def _together(self, do: str, arguments: dict[str, Any], is_timed: bool) -> list[dict[str, Any]]:
        try:
            if not self._children:
                self._start()
            deadline = time.monotonic() + self._bound_seconds
            for child in self._children:
                child.tell({"do": do, **arguments})
            if is_timed:
                self._answers(deadline)
                at = time.monotonic() + LEAD_SECONDS
                for child in self._children:
                    child.tell({"at": at})
            return self._answers(deadline)
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.ranks):
            log = self._log.with_name(f"{self._log.name}-{rank}.txt")
            self._children.append(Child(self.name, rank, self.ranks, port, log))
        self._answers(time.monotonic() + START_SECONDS_MAX)

    def _answers(self, deadline: float) -> list[dict[str, Any]]:
        """One answer of each rank. The first error ends the wait: the other ranks may wait for the one that failed."""
        answers: dict[Child, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                selector.register(child.answers, selectors.EVENT_READ, child)
            while len(answers) < len(self._children):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise FailedError(f"took longer than {self._bound_seconds:g} s")
                for key, _ in ready:
                    answer = key.data.read()
                    if answer is None:
                        continue
                    if "error" in answer:
                        raise FailedError(answer["error"])
                    answers[key.data] = answer
                    selector.unregister(key.fileobj)
        return [answers[child] for child in self._children]


class Child:
    """One process, in a session of its own, so that Ctrl-C reaches only us and we end the others."""

    def __init__(self, name: str, rank: int, ranks: int, port: int, log: Path) -> None:
        environment = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}  # as every launcher tells them
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(CHILD), name, str(rank), str(ranks), str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self.answers = self._process.stdout
        self._partial = b""

    def tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise FailedError(self._ending()) from error

    def read(self) -> dict[str, Any] | None:
        """The answer, or None while only a part of it is there."""
        data = os.read(self.answers.fileno(), 1 << 16)
        if not data:
            raise FailedError(self._ending())
        self._partial += data
        if not self._partial.endswith(b"\n"):
            return None
        line, self._partial = self._partial, b""
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def kill(self) -> None:
        """End the process and everything below it."""
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        for process in below:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(
                self._process.pid, signal.SIGKILL
            )  # its session outlives it where something below has been orphaned
        self._process.wait()
        psutil.wait_procs(below, timeout=10)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _ending(self) -> str:
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "its process closed its output"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"its process ended with {status}: {lines[-1] if lines else 'it said nothing'}"


def end_descendants() -> None:
    """End whatever else we have started: a signal may come between the start of a process and its place in a list."""
    below = psutil.Process().children(recursive=True)
    for process in below:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(below, timeout=10)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert isinstance(port, int)
    return port
