"""This node's part of a checkpoint attempt: armed on its pages, sealed in its arenas, persisted, given up."""

from __future__ import annotations

from dataclasses import replace
from functools import partial, reduce

from ftrain.core import messages as m
from ftrain.core.node_state import (
    SLOTS_MIN,
    Armed,
    ArmPages,
    CancelPersist,
    DisarmPages,
    Persist,
    SetVerdict,
    Snapshot,
    State,
    Turn,
)
from ftrain.core.page import Phase


def arm(turn: Turn, message: m.Arm) -> None:
    state = turn.state
    attempt, snapshot = message.attempt, state.snapshot
    if snapshot is not None and snapshot.attempt == attempt:
        repeat(turn)
        return
    if attempt.generation != state.generation or attempt.number < state.attempt_seen:
        return
    if attempt.number == state.attempt_seen:
        turn.send(m.ArmReply(attempt, False, -1, "it was refused, or given up, before"))
        return
    turn.set(attempt_seen=attempt.number)
    if snapshot is not None and snapshot.hold and not snapshot.decided:
        # Who had it held is gone, or it would have said what becomes of it.
        turn.do(SetVerdict(snapshot.attempt, False, ranks_of(state)))
    busy = {*(slot for _, slot in state.filling.values()), *state.writing.values()}
    # What the run would go on from stays as it is until there is something newer.
    busy |= {slot for slot, held in state.held.items() if held in message.stays}
    is_taken = snapshot is not None and _is_sealed(state, snapshot)
    if snapshot is not None and not is_taken:
        busy.add(snapshot.slot)
    slots = min((worker.slots for worker in state.workers.values() if worker.slots), default=SLOTS_MIN)
    free = sorted((slot for slot in range(slots) if slot not in busy), key=partial(_worth, state))
    if state.stopping or state.halting or not state.all_looping:
        turn.send(m.ArmReply(attempt, False, -1, "not all of its workers are in their loop"))
    elif not free:
        turn.send(m.ArmReply(attempt, False, -1, "an earlier snapshot is still being written"))
    else:
        held = {slot: held for slot, held in state.held.items() if slot != free[0]}
        copied = {slot: held for slot, held in state.copied.items() if slot != free[0]}
        if snapshot is not None and is_taken and snapshot.persist:
            turn.set(saving=snapshot)
        snapshot = Snapshot(attempt, free[0], message.hold, message.persist, message.base)
        turn.set(snapshot=snapshot, held=held, copied=copied)
        turn.do(ArmPages(attempt, free[0], message.hold, ranks_of(state)))


def _worth(state: State, slot: int) -> tuple[bool, int]:
    """How much what the slot holds could still be of use: first whether it is being copied, then its step."""
    return slot in state.copied, state.held[slot].step if slot in state.held else -1


def copy(turn: Turn, attempt: m.Attempt) -> None:
    """From now on that is sent to the keeper, if it is held."""
    state = turn.state
    found = {slot: held for slot, held in state.held.items() if held == attempt}
    turn.set(copied={**state.copied, **found})


def armed(turn: Turn, event: Armed) -> None:
    snapshot = turn.state.snapshot
    if snapshot is None or snapshot.attempt != event.attempt:
        return
    if event.ok:
        turn.set(snapshot=replace(snapshot, armed=True))
        turn.send(m.ArmReply(event.attempt, True, event.furthest))
    else:
        turn.set(snapshot=None)
        fill(turn, snapshot, event.reached)
        if snapshot.hold:
            turn.do(SetVerdict(event.attempt, False, ranks_of(turn.state)))
        turn.send(m.ArmReply(event.attempt, False, event.furthest, "a rank is past this step already"))


def over(turn: Turn, attempt: m.Attempt) -> Snapshot | None:
    """The attempt is committed or given up. Returns what this node had of it."""
    snapshot = _of(turn.state, attempt)
    if snapshot is not None:
        _keep(turn, snapshot.attempt, None)
    return snapshot


def _of(state: State, attempt: m.Attempt) -> Snapshot | None:
    return next((snapshot for snapshot in state.snapshots if snapshot.attempt == attempt), None)


def _keep(turn: Turn, attempt: m.Attempt, snapshot: Snapshot | None) -> None:
    saving = turn.state.saving
    if saving is not None and saving.attempt == attempt:
        turn.set(saving=snapshot)
    else:
        turn.set(snapshot=snapshot)


def abort(turn: Turn, attempt: m.Attempt) -> None:
    snapshot = over(turn, attempt)
    if snapshot is None:
        return
    unsealed = tuple(rank for rank in ranks_of(turn.state) if rank not in snapshot.sealed)
    if unsealed:
        # Until the pages say otherwise each of them may be writing its slot.
        fill(turn, snapshot, frozenset(unsealed))
        turn.do(DisarmPages(attempt, unsealed))
    if any(other == attempt for other, _ in turn.state.writing):
        turn.do(CancelPersist(attempt))
    if snapshot.hold and not snapshot.decided:
        turn.do(SetVerdict(attempt, False, ranks_of(turn.state)))


def fill(turn: Turn, snapshot: Snapshot, ranks: frozenset[int]) -> None:
    turn.set(filling={**turn.state.filling, **dict.fromkeys(ranks, (snapshot.attempt.step, snapshot.slot))})


def still_filling(turn: Turn, reached: frozenset[int]) -> None:
    turn.set(filling={rank: place for rank, place in turn.state.filling.items() if rank in reached})


def may_fill(page: tuple[int, int], step: int) -> bool:
    """Whether a worker that is there may be taking the snapshot of `step`.

    A worker enters BOUNDARY before it stores STEP, and leaves it for SNAPSHOT only when it saw the attempt.
    """
    done, phase = page
    return done == step and phase in (Phase.BOUNDARY, Phase.SNAPSHOT)


def repeat(turn: Turn) -> None:
    """Say again where what is under way stands: the coordinator forgets duplicates, but it must not miss one."""
    for snapshot in turn.state.snapshots:
        if not snapshot.armed:
            continue
        turn.send(m.ArmReply(snapshot.attempt, True))
        if _is_sealed(turn.state, snapshot):
            turn.send(_sealed(turn.state, snapshot))
        for pack in snapshot.packs:
            turn.send(m.Prepared(snapshot.attempt, pack))
        for failure in snapshot.failures:
            turn.send(failure)


def sealed(turn: Turn, snapshot: Snapshot, rank: int) -> None:
    snapshot = replace(snapshot, sealed=snapshot.sealed | {rank})
    turn.set(snapshot=snapshot)
    if _is_sealed(turn.state, snapshot):
        turn.set(held={**turn.state.held, snapshot.slot: snapshot.attempt})
        turn.send(_sealed(turn.state, snapshot))
    if snapshot.persist:
        turn.set(writing={**turn.state.writing, (snapshot.attempt, rank): snapshot.slot})
        turn.do(Persist(snapshot.attempt, rank, snapshot.slot, snapshot.base))


def _is_sealed(state: State, snapshot: Snapshot) -> bool:
    return snapshot.sealed >= set(state.workers)


def _sealed(state: State, snapshot: Snapshot) -> m.Sealed:
    costs = (worker.cost for worker in state.workers.values())
    return m.Sealed(snapshot.attempt, tuple(state.workers), reduce(m.Cost.most, costs))


def unfill(turn: Turn, rank: int) -> None:
    turn.set(filling={key: place for key, place in turn.state.filling.items() if key != rank})


def persisted(turn: Turn, attempt: m.Attempt, pack: m.PackRecord) -> None:
    _written(turn, attempt, pack.rank)
    snapshot = _of(turn.state, attempt)
    if snapshot is not None:
        _keep(turn, attempt, replace(snapshot, packs=(*snapshot.packs, pack)))
        turn.send(m.Prepared(attempt, pack))


def persist_failed(turn: Turn, attempt: m.Attempt, rank: int, cause: str) -> None:
    _written(turn, attempt, rank)
    snapshot = _of(turn.state, attempt)
    if cause and snapshot is not None:
        fail(turn, snapshot, rank, cause)


def fail(turn: Turn, snapshot: Snapshot, rank: int, cause: str) -> None:
    failure = m.AttemptFailed(snapshot.attempt, rank, cause)
    _keep(turn, snapshot.attempt, replace(snapshot, failures=(*snapshot.failures, failure)))
    turn.send(failure)


def _written(turn: Turn, attempt: m.Attempt, rank: int) -> None:
    key = (attempt, rank)
    turn.set(writing={other: slot for other, slot in turn.state.writing.items() if other != key})


def ranks_of(state: State) -> tuple[int, ...]:
    return tuple(worker.rank for worker in state.alive)
