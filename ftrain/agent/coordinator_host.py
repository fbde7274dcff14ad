"""The coordinator's shell: carries out what `core.coordinator` decides. It runs inside node 0's agent or by itself.

It owns the service's socket, the journal's storage and the clock, and nothing else: all that it knows is rebuilt from
the journal and the agents, so it may die at any moment.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ftrain.agent import proc
from ftrain.agent.report import metrics_text, status
from ftrain.agent.story import Story
from ftrain.checkpoint.publish import publish
from ftrain.checkpoint.retain import pinned_paths, remove, sweep
from ftrain.control.secret import Secret
from ftrain.control.service import Peer, Service
from ftrain.core import coordinator, journal, run_state
from ftrain.core import messages as m
from ftrain.core.run_state import Phase, RunPolicy
from ftrain.errors import AlreadyExists, FtrainError, NotFound, StorageError, UnknownOutcome
from ftrain.storage.base import Storage
from ftrain.storage.history import durable_history

log = logging.getLogger("ftrain")
DISCARDED_MAX = 256


class CoordinatorHost:
    """`start` binds and takes the run over; `run` returns the exit code and a summary."""

    def __init__(
        self,
        policy: RunPolicy,
        storage: Storage,
        secret: Secret,
        hosts: Sequence[str],
        port: int,
        story_directory: Path | None,
    ) -> None:
        self._storage = storage
        self._service = Service(self, secret, hosts, port)
        self.policy = policy
        self._writer = uuid.uuid4().hex  # unique for this life of the coordinator
        self._peers: dict[str, Peer] = {}
        self._heard: set[str] = set()  # nodes whose Hello the machine has seen
        self._events: deque[run_state.Event] = deque()
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[run_state.Exit] = self._loop.create_future()
        self._journal = ThreadPoolExecutor(1, "ftrain-journal")  # one: its operations keep their order
        self._files = ThreadPoolExecutor(2, "ftrain-publish")
        # Removed again and again: an agent may still have been writing to one when it was removed first.
        self._discarded: deque[str] = deque(maxlen=DISCARDED_MAX)
        self._story = Story(story_directory)
        self._state: run_state.State | None = None
        self._early: list[run_state.Event] = []

    async def start(self) -> int:
        """Listen, read the journal, take over. Returns the port. Raises `Unavailable` when it cannot listen."""
        port = await self._service.start()
        history = await self._loop.run_in_executor(self._journal, durable_history, self._storage)
        self._state = coordinator.initial(self.policy, history, self._writer)
        self._post(run_state.Begin())
        for event in self._early:
            self._post(event)
        self._early.clear()
        return port

    async def run(self) -> run_state.Exit:
        try:
            return await self._done
        finally:
            await self.close()

    @property
    def leaving(self) -> bool:
        """The run is over, and the nodes are being told."""
        return self._state is not None and self._state.phase in (Phase.CLOSING, Phase.LEAVING)

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._service.close()
        self._files.submit(_discard, self._storage, tuple(self._discarded))
        for pool in (self._journal, self._files):
            await self._loop.run_in_executor(None, pool.shutdown)
        self._story.close()

    # ------------------------------------------------------------------------------------------- the service's owner

    def on_open(self, peer: Peer) -> None:
        self._peers[peer.hello.node] = peer

    def on_message(self, peer: Peer, message: m.FromAgent) -> None:
        if self._peers.get(peer.hello.node) is peer:
            self._post(run_state.Received(peer.hello.node, message))

    def on_close(self, peer: Peer, reason: str) -> None:
        log.debug("node on %s: %s", peer.hello.host, reason)
        if self._peers.get(peer.hello.node) is peer:
            del self._peers[peer.hello.node]
            self._post(run_state.Disconnected(peer.hello.node))

    def status(self) -> Any:
        if self._state is not None:
            return status(self._state, self._story)
        nothing_yet = coordinator.initial(self.policy, journal.History(), self._writer)
        return {**status(nothing_yet, self._story), "phase": "reading the journal"}

    def metrics(self) -> str:
        return metrics_text(self._state, self._story) if self._state is not None else ""

    # --------------------------------------------------------------------------------------------------- the machine

    def _post(self, event: run_state.Event) -> None:
        if self._state is None:
            self._early.append(event)
            return
        if self._done.done():
            return  # it is over, or given up: what storage or nodes still say has nobody to decide about it
        self._events.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._events:
                event = self._events.popleft()
                self._state, actions = coordinator.step(self._state, event, time.monotonic(), time.time())
                for action in actions:
                    self._carry_out(action)
                if isinstance(event, run_state.Received):
                    self._heard.add(event.node)
                self._close_strays()
        except Exception as error:  # the machine's edge: a bug here must not leave a coordinator that decides nothing
            log.exception("the coordinator failed")
            self._finish(run_state.Exit(70, f"the coordinator failed: {error!r}"))
        finally:
            self._busy = False
        self._set_timer()

    def _close_strays(self) -> None:
        """A node that was declined or lost must not stay connected unheard: an agent that lives comes back anew."""
        assert self._state is not None
        for node in self._heard.difference(self._state.nodes):
            self._heard.discard(node)
            if node in self._peers:
                self._peers[node].close("it is not part of the run any more")

    def _set_timer(self) -> None:
        assert self._state is not None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = coordinator.wake_at(self._state, time.monotonic())
        if due != float("inf") and not self._done.done():
            self._timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._post, run_state.Tick())

    def _carry_out(self, action: run_state.Action) -> None:
        match action:
            case run_state.Send(node, message):
                if node in self._peers:
                    self._peers[node].send(message)
            case run_state.Store(request):
                self._work(self._journal, lambda: run_state.Stored(_store(self._storage, request)))
            case run_state.Publish():
                self._work(self._files, lambda: _publish(self._storage, action, self._writer))
                self._files.submit(_discard, self._storage, tuple(self._discarded))
            case run_state.Discard(attempt):
                self._discarded.append(attempt.path)
                self._files.submit(_discard, self._storage, tuple(self._discarded))
            case run_state.Sweep():
                self._files.submit(_sweep, self._storage, action)
            case run_state.Exit():
                self._finish(action)
            case run_state.Resumed():
                self._story.tell(action)
                proc.trim_heap()
            case _:
                self._story.tell(action)

    def _work(self, pool: ThreadPoolExecutor, work: Callable[[], run_state.Event]) -> None:
        def run() -> None:
            event = work()
            self._loop.call_soon_threadsafe(self._post, event)

        pool.submit(run)

    def _finish(self, exit: run_state.Exit) -> None:
        if not self._done.done():
            self._done.set_result(exit)


def _store(storage: Storage, request: journal.Create | journal.Read) -> journal.Created | journal.ReadBack:
    match request:
        case journal.Create(path, data):
            try:
                storage.create(path, data)
            except AlreadyExists:
                return journal.Created(path, journal.Outcome.EXISTS)
            except UnknownOutcome as error:
                return journal.Created(path, journal.Outcome.UNKNOWN, str(error))
            except (StorageError, OSError) as error:
                return journal.Created(path, journal.Outcome.FAILED, str(error))
            return journal.Created(path, journal.Outcome.CREATED)
        case journal.Read(path):
            try:
                data = storage.read(path)
                # What is read may be acted upon: it has to be as durable as if we had just written it.
                return journal.ReadBack(path, data, known=storage.confirm(path, data))
            except NotFound:
                return journal.ReadBack(path, None)
            except (StorageError, OSError):
                return journal.ReadBack(path, None, known=False)


def _publish(storage: Storage, action: run_state.Publish, writer: str) -> run_state.Published:
    try:
        sha256 = publish(storage, action.attempt, action.world_size, action.packs, writer)
    except (FtrainError, OSError) as error:
        return run_state.Published(action.attempt, "", str(error))
    except Exception as error:  # a thread's edge: the attempt must end one way or the other
        log.exception("the manifest of %s could not be written", action.attempt)
        return run_state.Published(action.attempt, "", f"{type(error).__name__}: {error}")
    return run_state.Published(action.attempt, sha256)


def _sweep(storage: Storage, action: run_state.Sweep) -> None:
    try:
        sweep(storage, {attempt.path for attempt in action.needed}, action.before_generation)
    except (FtrainError, OSError) as error:
        log.warning("what former attempts left could not be removed: %s", error)


def _discard(storage: Storage, paths: Sequence[str]) -> None:
    try:
        pinned = pinned_paths(storage) if paths else set()
    except (FtrainError, OSError) as error:
        log.debug("nothing is removed yet: %s", error)
        return
    for path in paths:
        try:
            remove(storage, path, pinned)
        except (FtrainError, OSError) as error:
            log.debug("%s could not be removed yet: %s", path, error)
