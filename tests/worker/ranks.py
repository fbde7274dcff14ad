"""Ranks that have process groups and nothing else. `Ranks` plays their agents: it revokes and starts ranks anew.

Each rank is a process with a thread that revokes when told; what it does else is in group_trainings and group_meetings.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, TCPStore

from ftrain.worker import groups, process_group
from tests.worker.harness import FORKS, PATIENCE_SECONDS, wait_for

STILL = 100  # looks, a millisecond apart
STACKS_SECONDS = 1.0
PATIENCE = timedelta(seconds=PATIENCE_SECONDS)


@dataclass
class Place:
    """What a rank's process is told when it starts."""

    port: int
    rank: int
    size: int
    generation: int
    alone: bool
    path: str


class Ranks:
    """All ranks of a run, as one that plays their agents has them."""

    def __init__(self, path: Path, size: int, training: str, options: dict[str, Any], only: int | None) -> None:
        self._path = path
        self._training = training
        self._size = size
        self._store = TCPStore("127.0.0.1", 0, None, True, PATIENCE, wait_for_workers=False)
        self._generation = 1
        self._processes: dict[int, ForkServerProcess] = {}
        self._pipes: dict[int, Connection] = {}
        self._replaced: list[ForkServerProcess] = []
        for rank in range(size) if only is None else [only]:
            self._processes[rank], self._pipes[rank] = self._start(rank, alone=only is not None, options=options)

    def pid(self, rank: int) -> int:
        pid = self._processes[rank].pid
        assert pid is not None
        return pid

    def wait_killed(self, rank: int) -> None:
        self._processes[rank].join(PATIENCE_SECONDS)
        assert self._processes[rank].exitcode == -signal.SIGKILL

    def wait_stopped(self, rank: int) -> None:
        wait_for(lambda: psutil.Process(self.pid(rank)).status() == psutil.STATUS_STOPPED)

    def wait_blocked(self, rank: int) -> None:
        """Until its main thread sleeps and does nothing else for a while."""
        main = Path(f"/proc/{self.pid(rank)}/task/{self.pid(rank)}/stat")
        seen: list[str] = []

        def sleeps() -> bool:
            seen.append(main.read_text())
            return len(seen) >= STILL and len(set(seen[-STILL:])) == 1 and seen[-1].rpartition(")")[2].split()[0] == "S"

        wait_for(sleeps)

    def revoke(self, *ranks: int, generation: int | None = None) -> None:
        """Tell these that this generation is revoked: the present one, if none is named."""
        for rank in ranks:
            self._pipes[rank].send(("revoke", generation or self._generation))

    def name_generation(self, *ranks: int) -> None:
        """Tell these that there is another generation."""
        self._generation += 1
        for rank in ranks:
            self._pipes[rank].send(("next", self._generation))

    def replace(self, rank: int, **options: Any) -> None:
        """The next generation: that rank is started anew and rehearses, the others stay."""
        others = [other for other in range(self._size) if other != rank]
        self.revoke(*others)
        self.name_generation(*others)
        self._replaced.append(self._processes[rank])
        self._pipes[rank].close()
        self._processes[rank], self._pipes[rank] = self._start(rank, alone=True, options=options)

    def hear(self, rank: int) -> Any:
        assert self._pipes[rank].poll(PATIENCE_SECONDS), f"rank {rank} says nothing"
        return self._pipes[rank].recv()

    def hear_all(self) -> list[Any]:
        return [self.hear(rank) for rank in range(self._size)]

    def end(self) -> None:
        for rank, process in self._processes.items():
            process.join(PATIENCE_SECONDS)
            assert process.exitcode == 0, f"rank {rank} ended with {process.exitcode}{self._stacks(rank)}"

    def close(self) -> None:
        for process in (*self._replaced, *self._processes.values()):
            process.kill()
            process.join()
        for pipe in self._pipes.values():
            pipe.close()

    def _stacks(self, rank: int) -> str:
        """Where each thread of a rank is that has not ended."""
        process, path = self._processes[rank], _stacks_path(str(self._path), self.pid(rank))
        if process.is_alive():
            os.kill(self.pid(rank), signal.SIGUSR1)
            wait_for(lambda: path.stat().st_size > 0)
            process.join(STACKS_SECONDS)  # until all of it is written
        return "\n" + path.read_text() if path.exists() else ""  # it may have ended before it had any

    def _start(self, rank: int, alone: bool, options: dict[str, Any]) -> tuple[ForkServerProcess, Connection]:
        ours, theirs = FORKS.Pipe()
        place = Place(self._store.port, rank, self._size, self._generation, alone, str(self._path))
        process = FORKS.Process(target=_main, args=(self._training, place, theirs, options))
        process.start()
        theirs.close()
        return process, ours


@contextmanager
def ranks(path: Path, size: int, training: str, only: int | None = None, **options: Any) -> Iterator[Ranks]:
    """All ranks of a run of that size, or only one of them, which then is alone."""
    made = Ranks(path, size, training, options, only)
    try:
        yield made
    finally:
        made.close()


class Rank:
    """In the rank's process: its default group, and what it is told."""

    def __init__(self, place: Place, pipe: Connection) -> None:
        self.rank, self.size, self.path = place.rank, place.size, Path(place.path)
        self.alone = place.alone
        self.generation = place.generation
        self.collectives = 0
        self.store = TCPStore("127.0.0.1", place.port, None, False, PATIENCE, wait_for_workers=False)
        self._pipe = pipe
        self._generations: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        process_group.register(place.generation, True, self._count, alone=place.alone)
        store = HashStore() if place.alone else PrefixStore("group", self.store)
        dist.init_process_group(
            process_group.BACKEND, store=store, rank=self.rank, world_size=self.size, timeout=PATIENCE
        )
        process_group.destroy_at_exit()

    def say(self, *what: Any) -> None:
        self._pipe.send(what)

    def next_generation(self) -> int:
        """Waits until it is told that there is one."""
        self.generation = self._generations.get(timeout=PATIENCE_SECONDS)
        return self.generation

    def connect(self) -> None:
        groups.reform(PrefixStore("group", self.store), self.generation)

    def _count(self, _kind: object) -> None:
        self.collectives += 1

    def _listen(self) -> None:
        while True:
            try:
                word, generation = self._pipe.recv()
            except EOFError:
                return
            if word == "revoke":
                groups.revoke(generation)
            else:
                self._generations.put(generation)


def _stacks_path(path: str, pid: int) -> Path:
    return Path(path) / f"stacks-{pid}.txt"


def _main(training: str, place: Place, pipe: Connection, options: dict[str, Any]) -> None:
    faulthandler.register(signal.SIGUSR1, _stacks_path(place.path, os.getpid()).open("w"), all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    module, _, name = training.partition(":")
    run: Callable[..., None] = getattr(import_module(module), name)
    run(Rank(place, pipe), **options)
