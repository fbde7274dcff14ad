"""The agent: one for each node. It carries out what `core.node` decides, and tells it what happens.

Everything happens on one event loop; only persisting uses threads. No torch in here: the nursery has it, in its own
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Coroutine, Mapping

import msgspec

from ftrain import _native
from ftrain.agent import activity, environment, pages, proc, stacks
from ftrain.agent.child import Job
from ftrain.agent.forks import Nursery, NurseryDied
from ftrain.agent.peer_sender import Rank
from ftrain.agent.peers import FETCHED_SLOT, Peers
from ftrain.agent.saver import Saver
from ftrain.agent.workers import FD_NAMES, RankMemory, WorkerProcess
from ftrain.control.client import Client
from ftrain.control.secret import Secret
from ftrain.control.service import EVERYWHERE, LOOPBACK
from ftrain.core import local, node
from ftrain.core import messages as m
from ftrain.core.hangs import Look
from ftrain.core.local import Boot, Fetched, Recover
from ftrain.errors import ExitCode, FtrainError, PeerLost, Refused, Unavailable
from ftrain.spec import JobSpec
from ftrain.storage.base import Storage

log = logging.getLogger("ftrain")
LOG_DRAIN_SECONDS = 2.0
CALM_SECONDS = 1.0  # after a failure: by then most recoveries are over
LOOK_SECONDS = 0.25  # between two looks at the workers
WAITING_NOTE_SECONDS = 5.0


class Agent:
    """Runs until told to leave; `run` returns the exit code and a summary for the user."""

    def __init__(self, spec: JobSpec, hello: m.Hello, client: Client, storage: Storage, secret: Secret) -> None:
        self._spec = spec
        self._peers: Peers | None = None
        if spec.peer_copies and not spec.topology.single:
            self._peers = Peers(hello.run_id, hello.node, secret, self._ranks, self._held, self._post)
            port = self._peers.open(LOOPBACK if spec.topology.loopback else EVERYWHERE)
            hello = msgspec.structs.replace(hello, peer_port=port)
        self._state = node.State(
            hello,
            grace_seconds=spec.grace_seconds,
            coordinator_wait_seconds=spec.wait_seconds,
            lost_at=time.monotonic(),
        )
        self._client = client
        self._storage = storage
        self._loop = asyncio.get_running_loop()
        self._events: deque[node.Event] = deque()
        self._busy = False
        self._done: asyncio.Future[node.Exit] = self._loop.create_future()
        self._workers: dict[int, WorkerProcess] = {}
        self._memory: dict[int, RankMemory] = {}  # by local rank
        self._stores: dict[int, int] = {}  # pid -> generation
        self._store_ended = asyncio.Event()
        self._forks = 0  # under way
        self._ended_early: dict[int, tuple[int, int]] = {}  # pid -> code and signal
        self._tasks: set[asyncio.Task[None]] = set()
        self._saver = Saver(
            storage, spec.topology.processes, self._saved, spec.persist_bytes_per_second_max, spec.compress
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._post, node.Signalled(signal.Signals(number).name))
        self._nursery = self._new_nursery()
        self._heartbeat_seconds = 1.0
        self._last_refusal = ""
        self._null = os.open(os.devnull, os.O_WRONLY)

    async def run(self) -> node.Exit:
        _native.set_child_subreaper(True)
        channel = self._spawn(self._client.run(self._hello, self._heard, self._channel_changed))
        self._spawn(self._beat())
        self._spawn(self._watch())
        try:
            return await self._done
        finally:
            await self._close(channel)

    @property
    def welcomed(self) -> bool:
        """Whether a coordinator has ever taken this node."""
        return self._state.term > 0

    def finish(self, exit: node.Exit) -> None:
        """End now, with everything that runs here."""
        if not self._done.done():
            self._done.set_result(exit)

    def _new_nursery(self) -> Nursery:
        nursery = Nursery(self._ended, self._nursery_died)
        modules = environment.preload(self._spec.program)
        nursery.start(modules, environment.nursery(self._spec, self._state.hello.address), str(self._spec.directory))
        return nursery

    # ------------------------------------------------------------------------------------------------------ events in

    def _post(self, event: node.Event) -> None:
        """Decide about one event at a time, in order; what carrying out a decision brings up comes after it."""
        self._events.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._events:
                event = self._events.popleft()
                self._state, actions = node.step(self._state, event, time.monotonic(), self._pages())
                for action in actions:
                    self._carry_out(action)
        finally:
            self._busy = False

    def _hello(self) -> m.Hello:
        return node.hello(self._state, self._pages())

    def _pages(self) -> node.Pages:
        """Where the workers are, as their control pages say now."""
        return {rank: worker.where() for rank, worker in self._workers.items() if worker.page_fd >= 0}

    def _ranks(self) -> list[Rank]:
        """The workers, for their peer copies."""
        found = []
        for rank, worker in self._workers.items():
            known = self._state.workers.get(rank)
            if known is not None and worker.page_fd >= 0:
                looping = known.looping is not None
                found.append(Rank(rank, worker.where()[0], looping, known.shard, known.replays, worker.memory))
        return found

    def _held(self) -> Mapping[int, m.Attempt]:
        return self._state.copied

    def _heard(self, message: m.FromCoordinator) -> None:
        if isinstance(message, m.Welcome):
            self._heartbeat_seconds = message.heartbeat_seconds
            self._last_refusal = ""
        self._post(node.Said(message))

    def _channel_changed(self, error: FtrainError | None) -> None:
        if self._done.done():
            return
        if error is None:
            self._post(node.Connected())
            return
        if isinstance(error, Refused) and not self.welcomed:  # once it was taken, a stranger refuses
            self.finish(node.Exit(int(error.exit_code), str(error)))
            return
        if self._state.connected:
            log.warning("the coordinator cannot be reached (%s); training goes on, trying again", error)
        elif str(error) != self._last_refusal and time.monotonic() - self._state.lost_at > WAITING_NOTE_SECONDS:
            log.info("waiting for the coordinator: %s", error)
            self._last_refusal = str(error)
        self._post(node.Disconnected())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_seconds)
            self._post(node.Beat())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            found = [self._workers[one.rank] for one in self._state.alive if one.rank in self._workers]
            self._post(node.Looked({worker.rank: self._look(worker) for worker in found if worker.pid}))
            if self._state.workers and self._state.all_looping:
                pids = tuple(one.pid for one in self._state.alive)
                self._nursery.working(self._state.generation, pids, store=bool(self._stores))
            elif not self._state.alive:
                self._nursery.waiting()

    def _look(self, worker: WorkerProcess) -> Look:
        state, watched = activity.state(worker.pid), self._state.watches.get(worker.rank)
        wanted = watched is not None and watched.wants_usage(time.monotonic())
        found = pages.look(worker.page)
        return dataclasses.replace(
            found,
            stopped=state == activity.STOPPED,
            excused=found.excused or state == activity.TRACED,
            usage=activity.usage(worker.pid) if wanted else None,
        )

    def _worker_said(self, rank: int, message: local.FromWorker) -> None:
        self._post(node.WorkerSaid(rank, message))

    def _ended(self, pid: int, code: int, signum: int) -> None:
        if pid in self._stores:
            generation = self._stores.pop(pid)
            self._store_ended.set()
            self._post(node.StoreDown(generation))
            return
        worker = next((one for one in self._workers.values() if one.pid == pid), None)
        if worker is None:
            if self._forks:
                self._ended_early[pid] = (code, signum)  # its fork may not have been heard of yet
            return
        exit = worker.ended(code, signum, self._worker_said)
        if all(one.exit is not None or one.pid == pid for one in self._state.workers.values()):
            self._nursery.sweep()  # what the generation's workers had detached from themselves ends with it
        self._post(node.WorkerExited(exit))
        self._loop.call_later(CALM_SECONDS, proc.trim_heap)
        self._spawn(worker.logs.drained(LOG_DRAIN_SECONDS))

    def _nursery_died(self, cause: str) -> None:
        log.warning("%s; its workers ended with it, starting another", cause)
        for pid in (*self._stores, *(worker.pid for worker in self._workers.values() if worker.pid)):
            self._ended(pid, 0, int(signal.SIGKILL))
        if not self._done.done():
            self._nursery = self._new_nursery()

    def _saved(self, attempt: m.Attempt, rank: int, pack: m.PackRecord | None, cause: str) -> None:
        event = node.Persisted(attempt, pack) if pack is not None else node.PersistFailed(attempt, rank, cause)
        with contextlib.suppress(RuntimeError):  # the loop is closed when the agent left in a hurry
            self._loop.call_soon_threadsafe(self._saving_ended, attempt, event)

    def _saving_ended(self, attempt: m.Attempt, event: node.Event) -> None:
        self._post(event)
        if all(writing != attempt for writing, _ in self._state.writing):
            self._saver.forget(attempt)

    # ---------------------------------------------------------------------------------------------------- actions out

    def _carry_out(self, action: node.Action) -> None:
        match action:
            case node.Send(message):
                self._client.send(message)
            case node.Reconnect():
                self._client.reconnect()
            case node.Fork(start, ranks):
                self._begin(start)
                self._spawn(self._fork(start, ranks))
            case node.Continue(start, ranks):
                self._begin(start)
                self._continue(start, ranks)
            case node.RevokePages(generation, ranks):
                for rank in ranks:
                    pages.revoke(self._workers[rank].page, generation)
            case node.KillRanks(ranks):
                for rank in ranks:
                    # One that is still being forked is killed as soon as it is there.
                    if rank in self._workers and self._workers[rank].pid:
                        self._nursery.signal(self._workers[rank].pid, signal.SIGKILL)
            case node.DumpStack(rank):
                self._spawn(self._dump_stack(self._workers[rank]))
            case node.Kill(grace_seconds):
                self._kill(grace_seconds)
            case node.ArmPages(attempt, slot, hold, ranks):
                result = pages.arm({rank: self._workers[rank].page for rank in ranks}, attempt, slot, hold)
                self._post(node.Armed(attempt, result.ok, result.furthest, result.reached))
            case node.DisarmPages(attempt, ranks):
                reached = pages.disarm({rank: self._workers[rank].page for rank in ranks}, attempt)
                self._post(node.Disarmed(attempt, reached))
            case node.SetVerdict(attempt, leave, ranks):
                for rank in ranks:
                    pages.give_verdict(self._workers[rank].page, attempt, leave)
            case node.ReleasePages(generation, ranks):
                for rank in ranks:
                    pages.release(self._workers[rank].page, generation)
            case node.Persist(attempt, rank, slot, base):
                self._saver.save(attempt, rank, self._workers[rank].memory.arena, slot, base)
            case node.CancelPersist(attempt):
                self._saver.cancel(attempt)
            case node.HostStore(generation):
                self._spawn(self._host_store(generation))
            case node.Show(text, level):
                log.log(logging.getLevelName(level.upper()), text)
            case node.Exit():
                self.finish(action)

    async def _dump_stack(self, worker: WorkerProcess) -> None:
        def ask() -> None:
            self._nursery.signal(worker.pid, local.STACK_SIGNAL)

        stack = await stacks.dump(ask, worker.logs.directory / "stderr.log")
        self._post(node.Dumped(worker.rank, worker.pid, stack))

    async def _fork(self, start: m.Start, ranks: tuple[int, ...]) -> None:
        self._end_stores(start.generation - 1)
        for rank in set(self._workers) - set(start.survivors):
            self._workers.pop(rank).close()
        for rank in ranks:
            local_rank = rank - start.first_rank
            memory = self._rank_memory(local_rank, rank, start)
            self._workers[rank] = WorkerProcess.prepare(self._spec.output, start.generation, rank, local_rank, memory)
        workers = [self._workers[rank] for rank in ranks]
        fetching = [self._fetch(start, workers)] if start.fetch is not None else []  # they prepare themselves meanwhile
        await asyncio.gather(*fetching, *(self._fork_one(start, worker) for worker in workers))

    def _begin(self, start: m.Start) -> None:
        if self._peers is not None:
            self._peers.begin(start)

    async def _fetch(self, start: m.Start, workers: list[WorkerProcess]) -> None:
        """Bring what the new ranks go on from to this node. Where that fails it is their end."""
        assert start.line is not None
        try:
            if self._peers is None:
                raise PeerLost("this node was started with --peer-copies off, unlike the one before it")
            memory = {worker.rank: worker.memory for worker in workers}
            await self._peers.fetch(start, memory, lambda: self._is_wanted(start))
        except PeerLost as error:
            log.warning("peer copies: %s", error)
            for worker in workers:
                worker.given_up = str(error)
                if worker.pid:  # one that is still being forked is killed as soon as it is there
                    self._nursery.signal(worker.pid, signal.SIGKILL)
            return
        if start.line.attempt is not None:
            self._post(node.Fetched(start.generation, FETCHED_SLOT, start.line.attempt))
        for worker in workers:
            worker.tell(Fetched())

    def _is_wanted(self, start: m.Start) -> bool:
        state = self._state
        return state.start is start and not (state.stopping or state.halting) and state.leave is None

    def _not_forked(self, worker: WorkerProcess, why: str) -> None:
        worker.close_worker_ends()
        report = m.ErrorReport("ftrain.NurseryDied", why, "", unix_seconds=time.time())
        self._post(node.WorkerExited(m.RankExit(worker.rank, worker.local_rank, 0, 1, error=report)))

    def _rank_memory(self, local_rank: int, rank: int, start: m.Start) -> RankMemory:
        known = self._memory.get(local_rank)
        writing = {writer for _, writer in self._state.writing}
        gets_snapshot = start.fetch is not None and start.line is not None and start.line.attempt is not None
        if known is not None and not gets_snapshot and (start.line is not None or rank not in writing):
            return known
        # A snapshot in the old one is still being persisted: it closes with the last reference to it.
        self._memory[local_rank] = RankMemory(local_rank)
        return self._memory[local_rank]

    def _end_stores(self, generation: int) -> None:
        """End the stores of generations up to this one."""
        for pid, hosted in self._stores.items():
            if hosted <= generation:
                self._nursery.signal(pid, signal.SIGKILL)

    def _continue(self, start: m.Start, ranks: tuple[int, ...]) -> None:
        assert start.line is not None
        self._end_stores(start.generation - 1)
        address, port = start.master_address, start.master_port
        for rank in ranks:
            self._workers[rank].tell(Recover(start.generation, address, port, start.line, start.resume))

    async def _fork_one(self, start: m.Start, worker: WorkerProcess) -> None:
        program = self._spec.program
        boot = Boot(
            run_id=self._spec.run_id,
            run_dir=str(self._spec.run_dir),
            storage=self._spec.storage,
            generation=start.generation,
            rank=worker.rank,
            local_rank=worker.local_rank,
            world_size=start.world_size,
            page_fd=0,
            arena_fd=0,
            channel_fd=0,
            box_fd=0,
            arena_bytes_max=0,
            checkpoints=not self._spec.checkpoint.off or self._spec.checkpoint.snapshots,
            resume=start.resume,
            loopback=self._spec.topology.loopback,
            line=start.line,
            slots=start.slots,
            fetched=start.fetch is not None,
        )
        job = Job(
            program.kind,
            program.target,
            program.arguments,
            environment.worker(
                self._spec, start, worker.rank, worker.local_rank, worker.error_file, self._state.hello.address
            ),
            str(self._spec.directory),
            FD_NAMES,
            boot,
        )
        self._forks += 1
        try:
            pid = await self._nursery.fork(job, worker.fds)
        except NurseryDied as error:
            self._not_forked(worker, str(error))
            return
        finally:
            self._forks -= 1
        worker.forked(pid, self._worker_said)
        self._post(node.Forked(worker.rank, pid))
        if (end := self._ended_early.pop(pid, None)) is not None:
            self._ended(pid, *end)
            return
        if not self._forks:
            self._ended_early.clear()
        now = self._state.workers.get(worker.rank)
        if self._state.stopping or self._state.leave is not None or now is None or now.killed or worker.given_up:
            self._nursery.signal(pid, signal.SIGKILL)  # that came while it was being forked

    def _kill(self, grace_seconds: float) -> None:
        for worker in self._state.alive:
            process = self._workers.get(worker.rank)
            if process is None or not process.pid:
                continue
            if worker.joined or grace_seconds <= 0:
                self._nursery.signal(process.pid, signal.SIGKILL)
            else:
                self._nursery.signal(process.pid, signal.SIGTERM)
                self._loop.call_later(grace_seconds, self._nursery.signal, process.pid, int(signal.SIGKILL))
        self._end_stores(self._state.generation)

    async def _host_store(self, generation: int) -> None:
        """A listening socket of ours, served by a process of its own: clients may connect before it serves."""
        with await self._listen_for_ranks(generation) as listening:
            self._post(node.StoreUp(generation, self._state.hello.address, listening.getsockname()[1]))
            job = Job(
                "function",
                "ftrain.worker.store:host",
                ("fd:listen", "1"),
                environment.base(self._spec, self._state.hello.address),
                str(self._spec.directory),
                ("stdout", "stderr", "listen"),
            )
            try:
                pid = await self._nursery.fork(job, (self._null, self._null, listening.fileno()))
            except NurseryDied as error:
                log.warning("the store of generation %d could not be started: %s", generation, error)
                self._post(node.StoreDown(generation))
                return
        self._stores[pid] = generation

    async def _listen_for_ranks(self, generation: int) -> socket.socket:
        """On any free port, or on the one that was asked for once the store before has let it go."""
        address, port = "127.0.0.1" if self._spec.topology.loopback else "", self._spec.topology.store_port
        if port:
            self._end_stores(generation - 1)
            while self._stores:
                self._store_ended.clear()
                await self._store_ended.wait()
        try:
            return socket.create_server((address, port), backlog=4096)
        except OSError as error:
            if not port:
                raise
            cause = os.strerror(error.errno or 0)
            raise Unavailable(
                f"--master-port {port}: the ranks' store cannot listen there ({cause}); give another port, or leave it "
                "out for any free one"
            ) from None

    # ------------------------------------------------------------------------------------------------------- the end

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            if isinstance(error, FtrainError):
                self.finish(node.Exit(int(error.exit_code), str(error)))
            else:
                log.error("the agent failed", exc_info=error)
                self.finish(node.Exit(int(ExitCode.INTERNAL), f"the agent failed: {error!r}"))

    async def _close(self, channel: asyncio.Task[None]) -> None:
        """Leave nothing behind: no process, no thread, no socket."""
        await self._nursery.close()
        if self._peers is not None:
            await self._peers.close()
        await asyncio.gather(*(worker.logs.drained(LOG_DRAIN_SECONDS) for worker in self._workers.values()))
        self._client.stop()
        await asyncio.wait({channel})
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._loop.run_in_executor(None, self._saver.close)
        for worker in self._workers.values():
            worker.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)
        os.close(self._null)
