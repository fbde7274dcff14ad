"""The nursery: one process on each node that has imported what training needs, and forks workers in milliseconds.

It runs as `python -m ftrain.agent.nursery FD`. It is the workers' parent and a child subreaper: whatever its workers
leave behind comes back to it and is killed, also when the agent dies and the socket to it closes. It keeps to one
thread and touches no GPU, because neither survives a fork; a module whose import starts threads is therefore left
out, unless its threads end by themselves before a fork, as OpenBLAS's do.

The agent sends `Fork`, `KeepSpares`, `Signal` and `Sweep`; the nursery answers with `Ready`, `Forked` and `Ended`,
one JSON packet each.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass, field

import msgspec

from ftrain import _native
from ftrain.agent import child, proc
from ftrain.agent.spares import Spare, wait_for_job

PACKET_BYTES_MAX = 1 << 20
FDS_MAX = 8
THREADS_END_SECONDS = 1.0  # a thread that was joined is still listed for a moment


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Fork a process that does `job`. The packet carries `len(job.fds)` descriptors."""

    id: int
    job: child.Job


class KeepSpares(msgspec.Struct, frozen=True, tag="spares"):
    """Have a process forked ahead for the next rank, with so many bytes of its heap touched, and one for a `store`."""

    heap_bytes: int
    store: bool


class Signal(msgspec.Struct, frozen=True, tag="signal"):
    pid: int
    number: int


class Sweep(msgspec.Struct, frozen=True, tag="sweep"):
    """Kill whatever former workers have left behind."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Everything is imported. `left_out` names modules that failed to import or started threads, and why."""

    seconds: float
    left_out: dict[str, str]


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    id: int
    pid: int
    error: str = ""


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    pid: int
    code: int
    signal: int


class Preload(msgspec.Struct, frozen=True):
    """What to import before the first fork, in order, and whose nursery this is."""

    agent: int  # pid
    modules: tuple[str, ...] = ()
    left_out: dict[str, str] = {}


_COMMAND = msgspec.json.Decoder(Fork | KeepSpares | Signal | Sweep)


@dataclass(slots=True)
class _Nursery:
    agent: socket.socket
    wakeup: int
    children: set[int] = field(default_factory=set)
    spares: list[Spare] = field(default_factory=list)
    job: tuple[child.Job, list[int]] | None = None  # set in a forked child only

    def serve(self) -> tuple[child.Job, list[int]] | None:
        """Until the agent is gone (returns None) or, in a child, until there is a job to do."""
        poll = select.poll()
        poll.register(self.agent, select.POLLIN)
        poll.register(self.wakeup, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self.wakeup:
                    os.read(self.wakeup, 4096)
                    self._reap()
                elif not self._obey():
                    return self.job

    def _obey(self) -> bool:
        try:
            packet, fds, _, _ = socket.recv_fds(self.agent, PACKET_BYTES_MAX, FDS_MAX)
        except ConnectionResetError:  # it was killed while something of ours was on its way to it
            return False
        if not packet:
            return False
        match _COMMAND.decode(packet):
            case Fork(number, job):
                return self._fork(number, job, fds)
            case KeepSpares(heap_bytes, store):
                return self._keep(heap_bytes, for_rank=True) and (not store or self._keep(0, for_rank=False))
            case Signal(pid, number):
                if pid in self.children:  # not reaped yet, so the number still names our child
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            case Sweep():
                self._sweep(None)
        return True

    def _fork(self, number: int, job: child.Job, fds: list[int]) -> bool:
        """False in the child, which has its job."""
        try:
            pid = self._given_to_a_spare(job, fds) or os.fork()
        except OSError as error:
            self.say(Forked(number, 0, f"cannot fork: {error}"))
            _close(fds)
            return True
        if pid == 0:
            self._leave_nursery()
            self.job = (job, fds)
            return False
        self.children.add(pid)
        _close(fds)
        self.say(Forked(number, pid))
        return True

    def _given_to_a_spare(self, job: child.Job, fds: list[int]) -> int:
        """The pid of the spare that does the job; 0 where there is none."""
        for spare in [one for one in self.spares if one.for_rank == (job.boot is not None)]:
            self.spares.remove(spare)
            if spare.give(job, fds):
                return spare.pid
        return 0

    def _keep(self, heap_bytes: int, *, for_rank: bool) -> bool:
        """Fork a spare where there is none. False in the spare itself, which has its job."""
        if any(spare.for_rank == for_rank for spare in self.spares):
            return True
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_BYTES_MAX)
        ours.setblocking(False)
        try:
            pid = os.fork()
        except OSError:  # who is needed will be forked then, or it will be said why not
            ours.close()
            theirs.close()
            return True
        if pid == 0:
            ours.close()
            self._leave_nursery()
            self.job = wait_for_job(theirs, heap_bytes, PACKET_BYTES_MAX, FDS_MAX)
            return False
        theirs.close()
        self.spares.append(Spare(pid, for_rank, ours))
        return True

    def _leave_nursery(self) -> None:
        """In a forked child: end with the nursery, and hold nothing of it."""
        _native.set_parent_death_signal(signal.SIGKILL)
        os.setsid()
        self.agent.close()
        for spare in self.spares:
            spare.channel.close()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for spare in [one for one in self.spares if one.pid == pid]:
                self.spares.remove(spare)
                spare.channel.close()
            if pid in self.children:
                # What it started must not outlive it: a forked data loader would keep its sockets open.
                self._sweep(pid)
                self.children.discard(pid)
                signum = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
                self.say(Ended(pid, 0 if signum else os.WEXITSTATUS(status), signum))

    def _sweep(self, session: int | None) -> None:
        """Kill orphans: those of one worker's session, or all that belong to no living worker."""
        living = self.children | {spare.pid for spare in self.spares}
        for pid in proc.children(os.getpid()):
            if pid in living or (session is not None and proc.session(pid) != session):
                continue
            for victim in (pid, *proc.descendants(pid)):
                _kill(victim)

    def say(self, message: Ready | Forked | Ended) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the agent's end is read next, and ends us
            self.agent.send(msgspec.json.encode(message))

    def extinguish(self) -> None:
        """Kill every descendant. As a subreaper we get the orphans too, so this ends with none left."""
        signal.set_wakeup_fd(-1)
        while True:
            for pid in proc.descendants(os.getpid()):
                _kill(pid)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _preload(preload: Preload) -> dict[str, str]:
    """Import what can be imported without harm. Returns what was left out, and why."""
    left_out = dict(preload.left_out)
    for name in preload.modules:
        if name in left_out:
            continue
        before = proc.threads()
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the script will meet it again, and say so
            left_out[name] = f"{type(error).__name__}: {error}"
            continue
        if proc.threads() > before and not _ended_by_a_fork(before):
            left_out[name] = "its import starts threads"
            # The threads cannot be taken back: begin again without this module.
            again = msgspec.json.encode(Preload(preload.agent, preload.modules, left_out)).decode()
            os.execv(sys.executable, [sys.executable, "-m", "ftrain.agent.nursery", sys.argv[1], again])
    return left_out


def _ended_by_a_fork(threads: int) -> bool:
    """Fork once for nothing, and see whether the threads beyond so many end: their library then provides for forks."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    deadline = time.monotonic() + THREADS_END_SECONDS
    child_ended = False
    while not child_ended or proc.threads() > threads:
        child_ended = child_ended or os.waitpid(pid, os.WNOHANG)[0] == pid
        if time.monotonic() > deadline:
            if not child_ended:  # a library that does not survive a fork at all
                _kill(pid)
                os.waitpid(pid, 0)
            return False
        time.sleep(0.001)
    return True


def main() -> None:
    agent = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(agent.fileno(), True)
    preload = msgspec.json.decode(sys.argv[2], type=Preload)
    _native.set_child_subreaper(True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # who signals the whole group gets an answer from the agent
    started = time.monotonic()
    # Nothing is below us yet, so this is enough; later the end of the socket tells, because more has to be done then.
    _native.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != preload.agent:
        return  # it was dead before its death could reach us
    left_out = _preload(preload)
    _native.set_parent_death_signal(0)
    os.set_inheritable(agent.fileno(), False)
    gc.collect()
    gc.freeze()  # shared pages stay shared: the collector must not write into them
    wakeup_read, wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_write)
    nursery = _Nursery(agent, wakeup_read)
    nursery.say(Ready(time.monotonic() - started, left_out))
    nursery_pid = os.getpid()
    job = nursery.serve()
    if job is None:
        nursery.extinguish()
        return
    signal.set_wakeup_fd(-1)
    os.close(wakeup_read)
    os.close(wakeup_write)
    if os.getppid() != nursery_pid:
        os._exit(1)  # the nursery died before its death could reach us
    child.run(*job)


if __name__ == "__main__":
    # Run as the module it is: the child's traceback filter and pickles must find it under its own name.
    from ftrain.agent import nursery

    nursery.main()
