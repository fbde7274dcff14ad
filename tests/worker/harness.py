"""Plays the agent for real worker processes: pages, arenas, channels and the store, and nobody else in the run.

The workers are forked from a server that has torch imported, as the nursery's are. What a worker recorded with `record`
is read back with `records`.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import msgspec
from torch.distributed import TCPStore

from ftrain._native import ControlPage, memory_file
from ftrain.checkpoint.publish import publish
from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.writing.persist import persist_slot
from ftrain.core import local
from ftrain.core.local import BOOT_VARIABLE, PACKET_BYTES_MAX, Boot
from ftrain.core.messages import Attempt, Resume
from ftrain.core.page import Field
from ftrain.storage.posix import PosixStorage

PATIENCE_SECONDS = 180.0
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.fsdp", "ftrain.worker"])
_DECODER = msgspec.json.Decoder(local.FromWorker)


@dataclass
class Worker:
    """One rank, as its agent has it."""

    rank: int
    page_fd: int = field(default_factory=lambda: ControlPage.create("test-page"))
    arena_fd: int = field(default_factory=lambda: memory_file("test-arena"))
    box_fd: int = field(default_factory=lambda: memory_file("test-box"))
    process: ForkServerProcess | None = None
    channel: socket.socket | None = None

    def __post_init__(self) -> None:
        self.page = ControlPage(self.page_fd)

    def hear(self, kind: type[Any]) -> Any:
        """The next message of that kind; others are passed over."""
        while True:
            said = self.next_message()
            assert said is not None, f"rank {self.rank} ended before it said {kind.__name__}"
            if isinstance(said, kind):
                return said

    def next_message(self) -> Any:
        assert self.channel is not None
        data = self.channel.recv(PACKET_BYTES_MAX)
        return _DECODER.decode(data) if data else None

    def end(self) -> int:
        """Its exit code, once it ended."""
        assert self.process is not None
        self.process.join(PATIENCE_SECONDS)
        assert self.process.exitcode is not None, f"rank {self.rank} did not end"
        return self.process.exitcode

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.kill()
        if self.channel is not None:
            self.channel.close()
        self.page.close()
        os.close(self.page_fd)
        os.close(self.arena_fd)
        os.close(self.box_fd)


class Agent:
    """The workers of one generation, all on this node."""

    def __init__(self, path: Path, generation: int, world_size: int, resume: Resume | None, checkpoints: bool) -> None:
        self.path = path
        self.storage = PosixStorage(path / "run")
        self.workers = [Worker(rank) for rank in range(world_size)]
        self._generation = generation
        self._resume = resume
        self._checkpoints = checkpoints
        self._store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=PATIENCE_SECONDS), wait_for_workers=False)

    def start(self, training: str, options: dict[str, Any]) -> None:
        """Start `training`, a "module:function", on every rank; returns once all have connected."""
        with tempfile.TemporaryDirectory(prefix="ft") as folder, socket.socket(*_UNIX) as listening:
            listening.bind(f"{folder}/channel")
            listening.listen(len(self.workers))
            for worker in self.workers:
                arguments = (training, self._boot(worker), self._environment(worker), f"{folder}/channel", options)
                worker.process = FORKS.Process(target=_work, args=(*arguments, str(self.path), os.getpid()))
                worker.process.start()
            listening.settimeout(PATIENCE_SECONDS)
            for _ in self.workers:
                channel, _ = listening.accept()
                channel.settimeout(PATIENCE_SECONDS)
                self.workers[int(channel.recv(16))].channel = channel

    def arm(self, step: int, number: int = 1, slot: int = 0, hold: bool = False) -> Attempt:
        for worker in self.workers:
            page = worker.page
            page.store(Field.ARMED_SLOT, slot)
            page.store(Field.ARMED_ATTEMPT, number)
            page.store(Field.ARMED_HOLD, int(hold))
            page.store(Field.ARMED, step)
        self.tell(Field.EVENT, 0)
        return Attempt(self._generation, step, number)

    def tell(self, field_: Field, value: int) -> None:
        """Store in all pages, and wake who waits."""
        for worker in self.workers:
            if field_ is not Field.EVENT:
                worker.page.store(field_, value)
            worker.page.add(Field.EVENT, 1)
            worker.page.wake(Field.EVENT)

    def release(self) -> None:
        self.tell(Field.RELEASE, self._generation)

    def hear(self, kind: type[Any]) -> list[Any]:
        return [worker.hear(kind) for worker in self.workers]

    def kill(self) -> None:
        for worker in self.workers:
            worker.kill()

    def commit(self, attempt: Attempt, slot: int = 0) -> Resume:
        """Persist what the arenas hold, whether or not their workers live."""
        packs = [
            persist_slot(self.storage, attempt, worker.rank, Arena(worker.arena_fd), slot, lambda: False)
            for worker in self.workers
        ]
        digest = publish(self.storage, attempt, len(self.workers), packs, "test")
        return Resume(attempt, len(self.workers), 1, digest)

    def end(self) -> list[int]:
        return [worker.end() for worker in self.workers]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    def _boot(self, worker: Worker) -> Boot:
        return Boot(
            run_id="test",
            run_dir=str(self.path / "run"),
            storage=str(self.path / "run"),
            generation=self._generation,
            rank=worker.rank,
            local_rank=worker.rank,
            world_size=len(self.workers),
            page_fd=worker.page_fd,
            arena_fd=worker.arena_fd,
            channel_fd=-1,
            box_fd=worker.box_fd,
            arena_bytes_max=0,
            checkpoints=self._checkpoints,
            resume=self._resume,
            loopback=True,
        )

    def _environment(self, worker: Worker) -> dict[str, str]:
        return {
            "RANK": str(worker.rank),
            "LOCAL_RANK": str(worker.rank),
            "WORLD_SIZE": str(len(self.workers)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(self._generation - 1),
            "OMP_NUM_THREADS": "1",
        }


_UNIX = (socket.AF_UNIX, socket.SOCK_SEQPACKET)


@contextmanager
def agent(
    path: Path, generation: int = 1, world_size: int = 2, resume: Resume | None = None, checkpoints: bool = True
) -> Iterator[Agent]:
    made = Agent(path, generation, world_size, resume, checkpoints)
    try:
        yield made
    finally:
        made.close()


def wait_for(condition: Callable[[], bool]) -> None:
    """For what a page shows but nobody tells."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def record(path: str, name: str, **values: Any) -> None:
    """Called in a worker: one line, by `name`."""
    with (Path(path) / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def records(path: Path, name: str) -> list[dict[str, Any]]:
    file = path / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _work(
    training: str, boot: Boot, environment: dict[str, str], channel: str, options: dict[str, Any], path: str, agent: int
) -> None:
    """What runs in the worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.set_start_method("fork", force=True)  # as in any process that does not come from a fork server
    connected = socket.socket(*_UNIX)
    connected.connect(channel)
    connected.send(str(boot.rank).encode())
    boot = msgspec.structs.replace(
        boot,
        page_fd=os.open(f"/proc/{agent}/fd/{boot.page_fd}", os.O_RDWR),
        arena_fd=os.open(f"/proc/{agent}/fd/{boot.arena_fd}", os.O_RDWR),
        box_fd=os.open(f"/proc/{agent}/fd/{boot.box_fd}", os.O_RDWR),
        channel_fd=connected.detach(),
    )
    os.environ.update(environment)
    os.environ[BOOT_VARIABLE] = msgspec.json.encode(boot).decode()
    module, _, name = training.partition(":")
    getattr(importlib.import_module(module), name)(path, **options)
