"""The agent's handle on its nursery: asks for forks, passes signals on, tells when a process ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ftrain.agent import nursery, proc
from ftrain.agent.child import Job
from ftrain.checkpoint.staging.memory import available_bytes
from ftrain.errors import FtrainError

log = logging.getLogger("ftrain")
_REPLY = msgspec.json.Decoder(nursery.Ready | nursery.Forked | nursery.Ended)
SEND_BUFFER_BYTES = 4 << 20
SPARES_AFTER_SECONDS = 0.5  # of work in which nothing failed
WAITING_SECONDS = 5.0  # of a node with nothing to do, which may be there to replace another
WAITING_HEAP_BYTES = 512 << 20  # for a rank of which nothing is known
SPARE_SHARE = 16  # a spare has at most this part of the memory that is free


class NurseryDied(FtrainError):
    """The nursery process ended. Its workers ended with it."""


class Nursery:
    """One nursery process. `on_ended(pid, code, signal)` is called for each fork that ends; `on_died()` once."""

    def __init__(self, on_ended: Callable[[int, int, int], None], on_died: Callable[[str], None]) -> None:
        self._on_ended = on_ended
        self._on_died = on_died
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._next_id = 0
        self._ready: asyncio.Future[nursery.Ready] = asyncio.get_running_loop().create_future()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._said: tuple[int, tuple[int, ...]] = (-1, ())  # the generation, and the pids of its ranks here
        self._spares_due = float("inf")

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def start(self, modules: Sequence[str], environment: Mapping[str, str], directory: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        ours.setblocking(False)
        preload = msgspec.json.encode(nursery.Preload(os.getpid(), tuple(modules))).decode()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ftrain.agent.nursery", str(theirs.fileno()), preload],
                pass_fds=[theirs.fileno()],
                env=dict(environment),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the agent's to answer
            )
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours, self._readable)

    async def ready(self) -> nursery.Ready:
        """Wait for the imports to be done. Raises `NurseryDied`."""
        return await asyncio.shield(self._ready)

    async def fork(self, job: Job, fds: Sequence[int]) -> int:
        """Fork a process that does `job` and return its pid. The caller keeps, and closes, its own `fds`."""
        await self.ready()
        self._next_id += 1
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting[self._next_id] = future
        await self._send(nursery.Fork(self._next_id, job), fds)
        return await future

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a fork; nothing happens if it has ended."""
        self._post(nursery.Signal(pid, number))

    def working(self, generation: int, pids: tuple[int, ...], *, store: bool) -> None:
        """All these ranks of the generation are in their loop, which is to be said again and again.

        After a while spares are forked for those that come after them, and for a `store` where one is needed here.
        """
        if self._are_due(generation, pids, SPARES_AFTER_SECONDS):
            self._keep_spares(max(map(proc.heap_bytes, pids)) - proc.heap_bytes(self.pid), store=store)

    def waiting(self) -> None:
        """No rank runs here, which is to be said again and again: after a while a spare is forked for one that may."""
        if self._ready.done() and self._are_due(0, (), WAITING_SECONDS):
            self._keep_spares(WAITING_HEAP_BYTES, store=False)

    def sweep(self) -> None:
        """Kill what former forks left behind."""
        self._post(nursery.Sweep())

    async def close(self) -> None:
        """Kill the nursery and everything below it; returns when all of it is gone."""
        if self._process is None or self._socket is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        # The end of the socket tells it to kill its descendants and end.
        self._socket.close()
        self._socket = None
        if not self._ready.done():
            self._process.kill()  # it still imports: nothing is below it, and it does not listen yet
        await loop.run_in_executor(None, _finish, self._process)

    def _are_due(self, generation: int, pids: tuple[int, ...], seconds: float) -> bool:
        """Once, when this was said for so long."""
        now = time.monotonic()
        if self._said != (generation, pids):
            self._said, self._spares_due = (generation, pids), now + seconds
        if now < self._spares_due:
            return False
        self._spares_due = float("inf")
        return True

    def _keep_spares(self, heap_bytes: int, *, store: bool) -> None:
        self._post(nursery.KeepSpares(max(0, min(heap_bytes, available_bytes() // SPARE_SHARE)), store))

    def _post(self, message: nursery.Signal | nursery.Sweep | nursery.KeepSpares) -> None:
        if self._socket is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
                self._socket.send(msgspec.json.encode(message))

    async def _send(self, message: nursery.Fork, fds: Sequence[int]) -> None:
        data = msgspec.json.encode(message)
        while self._socket is not None:
            try:
                socket.send_fds(self._socket, [data], list(fds))
                return
            except BlockingIOError:
                await asyncio.sleep(0.001)  # the nursery is busy forking; its queue is bounded
            except (BrokenPipeError, ConnectionResetError):
                break
        raise NurseryDied("the nursery ended before it could fork a worker")

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            packet = self._socket.recv(nursery.PACKET_BYTES_MAX)
        except BlockingIOError:
            return
        except ConnectionResetError:
            packet = b""
        if not packet:
            self._died()
            return
        match _REPLY.decode(packet):
            case nursery.Ready() as ready:
                for name, why in ready.left_out.items():
                    log.info("%s is not imported in advance, but by each worker (%s)", name, why)
                self._ready.set_result(ready)
            case nursery.Forked(number, pid, error):
                future = self._waiting.pop(number)
                if error:
                    future.set_exception(NurseryDied(error))
                else:
                    future.set_result(pid)
            case nursery.Ended(pid, code, signum):
                self._on_ended(pid, code, signum)

    def _died(self) -> None:
        assert self._socket is not None and self._process is not None
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self._socket = None
        _finish(self._process)
        code = self._process.returncode
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        error = NurseryDied(f"the nursery (pid {self._process.pid}) ended by {cause}")
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # it is raised to whoever waits; nobody may
        for future in self._waiting.values():
            future.set_exception(error)
        self._waiting.clear()
        self._on_died(str(error))


def _finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for the nursery, then for the orphans that a killed one left to us, its subreaper."""
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # The agent's only other children are orphans: what a killed nursery's workers had started.
    while orphans := proc.children(os.getpid()):
        for orphan in orphans:
            for pid in (*proc.descendants(orphan), orphan):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(orphan, 0)
