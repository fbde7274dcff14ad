"""One rank of one subject: does what the lines on its standard input say, and answers each with a line.

A timed command is answered twice: "ready" when all is prepared; and, after the line that names the moment to begin,
what it took. So the ranks of a subject begin together, and preparing is not measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import limits
import torch
import torch.distributed as dist
import training
import usage
from states import State, Workload, clear, digest
from subjects import SUBJECTS, Saver

PR_SET_PDEATHSIG = 1
Work = Callable[[], object]


class Rank:
    """What the commands do. A handler returns its answer, or the work to be timed."""

    def __init__(self, rank: int, ranks: int, saver: Saver | None) -> None:
        self.rank = rank
        self.ranks = ranks
        self._saver = saver
        self.state: State = {}

    @property
    def saver(self) -> Saver:
        assert self._saver is not None, "the limits do not save"
        return self._saver

    def open(self, workload: dict[str, Any], cleared: bool) -> dict[str, Any]:
        self.state = Workload(**workload).build(self.rank)
        if cleared:
            clear(self.state)
        return {}

    def close(self) -> dict[str, Any]:
        self.state = {}
        self.saver.close()
        usage.trim()
        return {}

    def save(self, path: str) -> Work:
        return functools.partial(self.saver.save, Path(path), self.state)

    def load(self, path: str) -> Work:
        return functools.partial(self.saver.load, Path(path), self.state)

    def digest(self) -> dict[str, Any]:
        return {"digest": digest(self.state)}

    def clear(self) -> dict[str, Any]:
        clear(self.state)
        return {}

    def stall(self, path: str, matmuls: int, check: bool) -> dict[str, Any]:
        return training.stall(self._trainer(matmuls), Path(path), check)

    def train(self, path: str, matmuls: int, steps: int) -> dict[str, Any]:
        return training.train(self._trainer(matmuls), Path(path), steps)

    def held(self, path: str, check: bool) -> dict[str, Any]:
        return self.saver.restore_held(Path(path) / str(self.rank), self.state, check)

    def memory(self, path: str) -> dict[str, Any]:
        """Resident bytes that a save and a load need at most over what stands between saves, and what stands."""
        usage.trim()
        opened = usage.resident_bytes()
        self.saver.save(Path(path) / "first", self.state)
        usage.trim()
        standing = usage.resident_bytes()
        usage.reset_peak()
        self.saver.save(Path(path) / "second", self.state)
        save_peak = usage.peak_bytes()
        usage.trim()
        before_load = usage.resident_bytes()
        usage.reset_peak()
        self.saver.load(Path(path) / "second", self.state)
        return {
            "standing": standing - opened,
            "save": save_peak - standing,
            "load": usage.peak_bytes() - before_load,
        }

    def memcpy(self, size: int, shared: bool) -> Work:
        return limits.memcpy(size, shared=shared)

    def direct_write(self, path: str, size: int) -> Work:
        return limits.write(self._file(path), size)

    def direct_read(self, path: str, size: int) -> Work:
        return limits.read(self._file(path), size, direct=True)

    def cached_read(self, path: str, size: int) -> Work:
        return limits.read(self._file(path), size, direct=False)

    def calibrate(self) -> dict[str, Any]:
        return {"matmuls_per_second": training.matmuls_per_second()}

    def _trainer(self, matmuls: int) -> training.Trainer:
        return training.Trainer(self.saver, self.state, self.ranks, matmuls)

    def _file(self, path: str) -> Path:
        return Path(path) / f"limit{self.rank}"


def timed(work: Work, at: float) -> dict[str, Any]:
    """Do the work at a moment of the monotonic clock, which all processes share."""
    gc.collect()
    cpu_before = usage.cpu_seconds()
    time.sleep(max(0.0, at - time.monotonic()))
    began = time.monotonic()
    work()
    ended = time.monotonic()
    return {"began": began, "ended": ended, "cpu_seconds": usage.cpu_seconds() - cpu_before}


def serve(rank: Rank, answers: Any) -> None:
    """Answer until standard input ends. A failed command is answered with its error, and is the last one."""

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    answer({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        try:
            done = getattr(rank, command.pop("do"))(**command)
            if callable(done):
                answer({"ready": True})
                done = timed(done, json.loads(sys.stdin.readline())["at"])
        except Exception as error:  # noqa: BLE001 (a subject may fail in any way; it is reported)
            answer({"error": f"{type(error).__name__}: {error}"})
            return
        answer(done)


def main() -> None:
    name, rank, ranks, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    subject = next((subject for subject in SUBJECTS if subject.name == name), None)
    if ranks > 1 or (subject is not None and subject.grouped):
        # A port of 0 says that there is nobody else to meet.
        store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    saver = subject.load_class()(rank, ranks, **subject.arguments) if subject is not None else None
    with contextlib.suppress(KeyboardInterrupt):
        serve(Rank(rank, ranks, saver), answers)
    os._exit(0)  # whatever the subject has running ends with its process; nothing here is worth waiting for


if __name__ == "__main__":
    main()
