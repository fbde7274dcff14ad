"""The lives of a run's coordinator and agents, with the parts of ftrain that touch storage, without the network.

One call after the other decides and acts as the real shells do: the journal's `Appender` and the attempt's `Barrier`
decide, the shells' own functions act. What a life says to others goes to `tell`, and is what an oracle goes by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ftrain import _native
from ftrain.agent.coordinator_host import _discard, _publish, _store
from ftrain.checkpoint.reading.restore import Checkpoint
from ftrain.checkpoint.retain import sweep
from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.state.items import TensorItem
from ftrain.checkpoint.writing.pack_plan import PackPlan
from ftrain.checkpoint.writing.persist import persist_slot
from ftrain.checkpoint.writing.unchanged import Memory
from ftrain.core import commit, journal, recovery, retention, run_state
from ftrain.core.codec import Codec
from ftrain.core.journal import Appender, CommitBody, History
from ftrain.core.layout import TensorSpec
from ftrain.core.messages import Attempt
from ftrain.core.retention import RetentionPolicy
from ftrain.core.write_plan import write_plan
from ftrain.errors import CorruptCheckpoint, FtrainError
from ftrain.storage.base import Effort, Storage
from ftrain.storage.history import durable_history

RANKS = 2
KEEP = 2
ELEMENTS = 1024  # of each tensor: one block
TRIES = 3  # of a record that storage refuses
SLOT = 0
INDEX_BYTES = 1 << 16
CODEC: Codec | None = None  # of all packs
SPECS = [
    [
        TensorSpec("w", "float32", (ELEMENTS,)),
        TensorSpec("own", "float32", (ELEMENTS,), private=True),
        TensorSpec("frozen", "float32", (ELEMENTS,)),  # is referred to, where its agent knows that it is on storage
    ],
    [TensorSpec("v", "float32", (ELEMENTS,))],
]


@dataclass(frozen=True, slots=True)
class Told:
    """What a life said: a commit is `submitted`, `acked` or `seen`, a `retiring` one may be gone, `began` took over."""

    what: str
    attempt: Attempt | None = None


Prove = Callable[[Storage, Attempt, str], None]  # as `restored`


class Stopped(Exception):
    """This life cannot go on: it was fenced, or storage does not take its records."""


class Life:
    """One process for the coordinator, one for the agents; `writer` is unique."""

    def __init__(
        self, open_storage: Callable[[], Storage], writer: str, tell: Callable[[Told], None] = lambda _: None
    ) -> None:
        self._storage, self._agent = open_storage(), open_storage()
        self._writer = writer
        self._tell = tell
        self._memory = Memory()
        self._generation = 0
        self._number = 0
        self._now = 0.0
        self.history = History()
        self._appender = Appender(writer, self.history.head)

    def read(self) -> None:
        """What the journal says, durably. Raises `FtrainError`."""
        self.history = durable_history(self._storage)

    def begin(self) -> None:
        """Take the run over. Raises `Stopped`, and `FtrainError` where storage fails."""
        self.read()
        for _, body in self.history.commits:
            self._tell(Told("seen", body.attempt))
        for former in self.history.retired:
            self._tell(Told("retiring", former.commit.attempt))
        live = {attempt.path for attempt in self.history.needed}
        newest = self.history.generation.generation if self.history.generation is not None else 0
        self._appender = Appender(self._writer, self.history.head)
        self._append(journal.RunBody("run", "job", "version"))
        sweep(self._storage, live, newest)
        self._tell(Told("began"))
        self._generation = newest + 1
        line = recovery.recovery_line(self.history, frozenset())
        resumes = line.attempt if line is not None else None
        self._append(journal.GenerationBody(self._generation, RANKS, (), resumes))

    def restore(self, prove: Prove | None = None) -> int:
        """Restore the newest commit that is whole into tensors, on all ranks. Returns its step, 0 where there is none.

        Raises `AssertionError` for a mixture.
        """
        suspects: set[Attempt] = set()
        while (line := recovery.recovery_line(self.history, suspects)) is not None:
            try:
                (prove or restored)(self._agent, line.attempt, line.manifest_sha256)
            except CorruptCheckpoint:
                suspects.add(line.attempt)
            else:
                return line.attempt.step
        return 0

    def commit(self, step: int) -> bool:
        """Try to checkpoint a step on all ranks. Whether it is committed. Raises `Stopped`."""
        self._number += 1
        attempt = Attempt(self._generation, step, self._number)
        ranks = frozenset(range(RANKS))
        state = commit.Barrier(attempt, frozenset(), ranks, stage=commit.Stage.SEALED, sealed=ranks)
        for rank in range(RANKS):
            if state.stage is commit.Stage.SEALED:
                state = self._feed(state, self._persist(attempt, rank))
        return state.stage is commit.Stage.COMMITTED

    def _feed(self, state: commit.Barrier, event: commit.Event) -> commit.Barrier:
        state, actions = commit.step(state, event)
        for action in actions:
            match action:
                case commit.Publish():
                    asked = run_state.Publish(state.attempt, RANKS, state.packs)
                    done = _publish(self._storage, asked, self._writer)
                    failed = commit.PublishFailed(done.cause)
                    state = self._feed(
                        state, commit.Published(done.manifest_sha256) if done.manifest_sha256 else failed
                    )
                case commit.WriteCommit():
                    self._tell(Told("submitted", state.attempt))
                    refers = sorted({attempt for pack in state.packs for attempt in pack.refers})
                    body = CommitBody(state.attempt, RANKS, state.manifest_sha256, 1, refers=tuple(refers))
                    self._append(body)
                    state = self._feed(state, commit.Recorded())
                case commit.AnnounceCommit():
                    self._tell(Told("acked", state.attempt))
                    for old in retention.to_retire(self.history, RetentionPolicy(KEEP), frozenset()):
                        self._tell(Told("retiring", old))
                        self._append(journal.RetireBody(old))
                        _discard(self._storage, [attempt.path for attempt in self.history.let_go])
                case commit.AnnounceAbort():
                    _discard(self._storage, (state.attempt.path,))
        return state

    def _persist(self, attempt: Attempt, rank: int) -> commit.Event:
        base = self.history.commits[-1][1].attempt if self.history.commits else None
        seal(attempt, rank)
        try:
            pack = persist_slot(
                self._agent, attempt, rank, _ARENAS[rank], SLOT, lambda: False, Effort(), self._memory, base, CODEC
            )
        except (FtrainError, OSError) as error:
            return commit.RankFailed(rank, str(error))
        return commit.RankPrepared(pack)

    def _append(self, body: journal.Body) -> None:
        event: journal.Event = journal.Append(body)
        stalls = 0
        while True:
            self._appender, actions = journal.step(self._appender, event, self._now, 1.0)
            for action in actions:
                match action:
                    case journal.Create() | journal.Read():
                        event = _store(self._storage, action)
                    case journal.Appended(record, digest):
                        self.history = self.history.after(record, digest)
                        return
                    case journal.Lost(path):
                        raise Stopped(f"fenced at {path}")
                    case journal.Stalled(_, cause, retry_at):
                        stalls += 1
                        if stalls == TRIES:
                            raise Stopped(cause)
                        self._now, event = retry_at, journal.Retry()


def restored(storage: Storage, attempt: Attempt, manifest_sha256: str) -> None:
    """Read a checkpoint into tensors as all ranks do, and compare. Raises `CorruptCheckpoint`, `AssertionError`."""
    checkpoint = Checkpoint.open(storage, attempt.path, manifest_sha256)
    shared = [spec for specs in SPECS for spec in specs if not spec.private]
    for rank in range(RANKS):
        specs = [*shared, *(spec for spec in SPECS[rank] if spec.private)]
        items = [TensorItem(spec, torch.zeros(spec.shape)) for spec in specs]
        checkpoint.read_into(items, rank)
        for item in items:
            expected = value(attempt.step, item.spec.key)
            assert bool(item.local.eq(expected).all()), f"{attempt}: {item.spec.key} of rank {rank} is a mixture"
        assert checkpoint.plain(rank) == {"step": attempt.step}


def value(step: int, key: str) -> float:
    return 0.125 if key == "frozen" else step + {"w": 0.25, "own": 0.5, "v": 0.75}[key]


def seal(attempt: Attempt, rank: int) -> None:
    """The rank's snapshot at this step, in its arena."""
    arena, plan = _ARENAS[rank], _PLANS[rank]
    arena.clear_index(SLOT)
    for write, offset in zip(plan.writes, plan.offsets, strict=True):
        tensor = torch.full(write.spec.shape, value(attempt.step, write.spec.key))
        arena.view(SLOT, offset, write.nbytes)[:] = memoryview(tensor.numpy()).cast("B")
    arena.write_index(SLOT, plan.encode(plan.index(attempt, {"step": attempt.step})))


def _arena(plan: PackPlan) -> Arena:
    arena = Arena(_native.memory_file("crash-arena"))
    arena.reserve(SLOT + 1, plan.layout.image_bytes, INDEX_BYTES, 0)
    return arena


_PLANS = [PackPlan(rank, RANKS, writes) for rank, writes in enumerate(write_plan(SPECS))]
_ARENAS = [_arena(plan) for plan in _PLANS]
