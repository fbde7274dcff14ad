"""Takes this rank's snapshots, and sees to it that all ranks agree on who writes what.

A snapshot begins at its boundary and is finished and sealed by a thread, while the next step runs.

All ranks plan together at their first boundary, which every one of them reaches. From then on a snapshot waits for
nobody. When what a rank tracks has changed since (an optimizer that got more state), its snapshot fails and it says so
in the group's store; all ranks look there at the next attempt, which no rank can be at before this one was given up,
and plan again. Only that one waits for the others, and no longer than the attempt is wanted: a rank may have passed its
boundary before it was armed.

The memory that a plan asks for is taken and touched by a thread, while the next steps run: for tens of gigabytes that
is many seconds. A snapshot that comes before that waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
from torch.distributed import HashStore, Store

from ftrain.checkpoint.reading.live_copy import shard_of
from ftrain.checkpoint.snapshot import Snapshotter
from ftrain.checkpoint.staging.stage import Staging
from ftrain.checkpoint.state.items import TensorItem
from ftrain.core import local
from ftrain.core.messages import Cost
from ftrain.errors import MismatchedState, PeerLost, Unavailable
from ftrain.worker.link import Armed, Link
from ftrain.worker.patience import wait_for

PATIENCE_SECONDS = 10.0  # for other ranks at one boundary, beyond which the attempt fails and training goes on
AT_ONCE_SECONDS = 0.05  # for memory that was reserved before, by this process or by the one before it

Capture = Callable[[], tuple[Sequence[TensorItem], dict[str, object]]]


class Snapshots:
    """One for each worker. `capture` gives everything tracked as it is now; `replays` is `Tracked.replays`."""

    def __init__(self, link: Link, capture: Capture, replays: Callable[[], bool]) -> None:
        boot = link.boot
        self._link = link
        self._store: Store = HashStore()
        self._capture = capture
        self._replays = replays
        self._rank, self._world_size = boot.rank, boot.world_size
        self._snapshotter = Snapshotter(
            link.arena, boot.rank, boot.world_size, self._exchange, boot.arena_bytes_max, boot.slots
        )
        self._planned_at: int | None = None  # number of the attempt that was planned for, 0 for the first boundary
        self._planning: Armed | None = None
        self._planned: local.WorkerPlanned | None = None  # what the agent was told
        self._rounds = 0
        self._finishing: threading.Thread | None = None
        self._reserving: Future[None] | None = None

    def prepare(self) -> None:
        """At each boundary. The first one is where all ranks plan, and waits for all of them.

        Raises what stands in the way of every snapshot to come: `MismatchedState` and `NotPlainData` at the first,
        `OutOfMemory` there or at a later one.
        """
        if self._planned_at is None:
            self._plan(None)
            executor = ThreadPoolExecutor(1, "ftrain-reserve")
            self._reserving = executor.submit(self._snapshotter.reserve)
            executor.shutdown(wait=False)
            if self._snapshotter.has_slots:
                futures.wait([self._reserving], AT_ONCE_SECONDS)
        if self._reserving is not None and self._reserving.done():
            self._have_memory()

    def meet(self, store: Store) -> None:
        """A generation begins, whose ranks plan at their next boundary, and meet in this store."""
        self._store = store
        self._planned_at = None

    def take(self, armed: Armed, tell: Callable[[], None]) -> None:
        """Begin to fill the slot that was armed; a thread seals it and tells the agent. Or tell it what went wrong.

        `tell` is called before that, when no device has to be waited for any more.
        """
        self.wait()
        began = time.monotonic()
        try:
            finish = self._begin(armed)
        except Exception as error:  # noqa: BLE001 - whatever a user's state_dict raises, too, becomes the attempt's cause
            self._failed(armed.attempt.number, error)
            return
        boundary_seconds = time.monotonic() - began
        # No daemon: a script that ends now still gets its snapshot sealed.
        self._finishing = threading.Thread(
            target=self._finish, args=(armed, finish, tell, began, boundary_seconds), name="ftrain-seal"
        )
        self._finishing.start()

    def wait(self) -> None:
        """Until the snapshot in flight, if there is one, is sealed or given up, and no memory is being reserved."""
        if self._reserving is not None:
            futures.wait([self._reserving])
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None

    def _begin(self, armed: Armed) -> Callable[[], Staging]:
        number = armed.attempt.number
        if self._reserving is not None:
            self._have_memory()
        if self._is_replan_due(number):
            try:
                self._plan(armed)
            except Exception:
                self._ask_replan(number)
                raise
        items, plain = self._capture()
        try:
            return self._snapshotter.take(armed.slot, armed.attempt, items, plain)
        except MismatchedState:
            self._ask_replan(number)
            raise

    def _finish(
        self,
        armed: Armed,
        finish: Callable[[], Staging],
        tell: Callable[[], None],
        began: float,
        boundary_seconds: float,
    ) -> None:
        try:
            staging = finish()
            tell()
        except Exception as error:  # noqa: BLE001 - a thread's edge: the attempt is given up, the training goes on
            self._failed(armed.attempt.number, error)
        else:
            waited = staging.stall_seconds - staging.boundary_seconds
            cost = Cost(boundary_seconds + waited, time.monotonic() - began, staging.taken_seconds())
            self._link.sealed(armed.attempt.number, cost)

    def _failed(self, number: int, error: Exception) -> None:
        self._link.not_sealed(number, f"{type(error).__name__}: {error}")

    def _plan(self, armed: Armed | None) -> None:
        self._planning, self._rounds = armed, 0
        items, plain = self._capture()
        if armed is None:
            self._snapshotter.agree(items, plain)
        else:
            self._snapshotter.plan(items, plain)
        self._planned_at = armed.attempt.number if armed else 0
        replays = self._replays() and not any(item.spec.private for item in items)
        slots = self._snapshotter.slots if armed else 0  # from the first boundary on they are being reserved
        self._planned = local.WorkerPlanned(shard_of(items, self._rank), replays, slots)
        self._link.say(self._planned)

    def _have_memory(self) -> None:
        """The memory that was being reserved is there. Raises `OutOfMemory`, each time, where it is not."""
        assert self._reserving is not None and self._planned is not None
        self._reserving.result()
        self._snapshotter.pin()
        self._reserving = None
        self._planned = msgspec.structs.replace(self._planned, slots=self._snapshotter.slots)
        self._link.say(self._planned)

    def _ask_replan(self, number: int) -> None:
        self._store.append(  # type: ignore[attr-defined]  # not in torch's stub
            "replan", f"{number},"
        )

    def _is_replan_due(self, number: int) -> bool:
        if not self._store.check(["replan"]):
            return False
        asked = [int(one) for one in self._store.get("replan").decode().split(",") if one]
        assert self._planned_at is not None, "prepare comes before take"
        # What is asked for during this very attempt is for the next: not all ranks would see it.
        return any(self._planned_at <= one < number for one in asked)

    def _exchange(self, own: bytes) -> list[bytes]:
        """Give every rank what each gave, by rank, through the store: no tensors, no pickle."""
        self._rounds += 1
        number = self._planning.attempt.number if self._planning else 0
        keys = [f"plan-{number}/{self._rounds}/{rank}" for rank in range(self._world_size)]
        self._store.set(keys[self._rank], own)  # type: ignore[arg-type]  # bytes are taken as they are
        self._wait(keys, self._planning)
        return [bytes(self._store.get(key)) for key in keys]

    def _wait(self, keys: list[str], armed: Armed | None) -> None:
        began = time.monotonic()

        def look() -> None:
            if self._link.revoked:
                raise PeerLost(f"generation {self._link.generation} ended while ranks were planning their snapshots")
            if armed is not None and not self._link.is_armed(armed.attempt):
                raise Unavailable(f"{armed.attempt} was given up while ranks were planning it")
            if armed is not None and time.monotonic() - began >= PATIENCE_SECONDS:
                raise Unavailable(f"not all ranks came to plan {armed.attempt} within {PATIENCE_SECONDS:.0f} seconds")

        wait_for(self._store, keys, look, self._world_size)
