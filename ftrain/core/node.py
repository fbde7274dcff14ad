"""Everything that an agent decides, as one pure state machine: the other half of `core.coordinator`.

It runs one generation's workers at a time, arms and disarms their control pages, has their sealed snapshots
persisted, and keeps the coordinator informed. It obeys only the newest term it has seen and only its present
generation: what an older coordinator or attempt asks for is not done.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from ftrain.core import keeping, node_attempts, node_hangs, node_lease, node_workers, recovery
from ftrain.core import messages as m
from ftrain.core.node_state import (
    Action,
    Armed,
    ArmPages,
    Beat,
    CancelPersist,
    Connected,
    Continue,
    Disarmed,
    DisarmPages,
    Disconnected,
    Dumped,
    DumpStack,
    Event,
    Exit,
    Fetched,
    Fork,
    Forked,
    HostStore,
    Keeps,
    Kill,
    KillRanks,
    Looked,
    Pages,
    Persist,
    Persisted,
    PersistFailed,
    Reconnect,
    ReleasePages,
    RevokePages,
    Said,
    Send,
    Sent,
    SetVerdict,
    Show,
    Signalled,
    Snapshot,
    State,
    StoreDown,
    StoreUp,
    Turn,
    Worker,
    WorkerExited,
    WorkerSaid,
    hello,
    report,
)
from ftrain.errors import ExitCode

SAME_NOTICE_SECONDS = 5.0  # batch systems send SIGTERM twice within seconds, and mean it once
LEFT_ON = {"SIGTERM": ExitCode.PREEMPTED, "SIGINT": ExitCode.INTERRUPTED}
UNSAVED_MARGIN_SECONDS = 5.0  # a leaving node waits this much longer than its grace for the coordinator's word

__all__ = [
    "Action",
    "ArmPages",
    "Armed",
    "Beat",
    "CancelPersist",
    "Connected",
    "Continue",
    "DisarmPages",
    "Disarmed",
    "Disconnected",
    "DumpStack",
    "Dumped",
    "Event",
    "Exit",
    "Fetched",
    "Fork",
    "Forked",
    "HostStore",
    "Keeps",
    "Kill",
    "KillRanks",
    "Looked",
    "Pages",
    "Persist",
    "PersistFailed",
    "Persisted",
    "Reconnect",
    "ReleasePages",
    "RevokePages",
    "Said",
    "Send",
    "Sent",
    "SetVerdict",
    "Show",
    "Signalled",
    "Snapshot",
    "State",
    "StoreDown",
    "StoreUp",
    "Worker",
    "WorkerExited",
    "WorkerSaid",
    "hello",
    "report",
    "step",
]


def step(state: State, event: Event, now: float, pages: Pages) -> tuple[State, tuple[Action, ...]]:
    """One event, one decision. `pages` are the control pages of the living workers as they are now."""
    if state.over:
        return state, ()
    turn = Turn(state, now, pages)
    if state.filling:
        now_filling = {
            rank: place
            for rank, place in state.filling.items()
            if node_attempts.may_fill(pages.get(rank, (-1, 0)), place[0])
        }
        turn.set(filling=now_filling)
    match event:
        case Connected():
            node_lease.connected(turn)
        case Disconnected():
            turn.set(connected=False, lost_at=now if state.connected else state.lost_at)
        case Said(message):
            _said(turn, message)
        case Forked(rank, pid):
            if rank in state.workers:
                turn.worker(rank, pid=pid)
        case WorkerSaid(rank, message):
            if rank in state.workers:
                node_workers.said(turn, rank, message)
        case WorkerExited(exit):
            node_workers.exited(turn, exit)
        case Armed():
            node_attempts.armed(turn, event)
        case Disarmed(_, reached):
            node_attempts.still_filling(turn, reached)
        case Persisted(attempt, pack):
            node_attempts.persisted(turn, attempt, pack)
        case PersistFailed(attempt, rank, cause):
            node_attempts.persist_failed(turn, attempt, rank, cause)
        case StoreUp(generation, address, port):
            turn.set(store=event)
            turn.send(m.StoreReady(generation, address, port))
        case StoreDown(generation):
            if state.store is not None and state.store.generation == generation:
                turn.set(store=None)
        case Keeps(kept):
            _keeps(turn, kept)
        case Sent(seconds):
            turn.set(sending_seconds=seconds)
        case Fetched(generation, slot, attempt):
            if generation == state.generation:
                turn.set(held={slot: attempt})
        case Signalled(why):
            _signalled(turn, why)
        case Looked(looks):
            node_hangs.looked(turn, looks)
        case Dumped(rank, pid, stack):
            node_hangs.dumped(turn, rank, pid, stack)
        case Beat():
            _beat(turn)
    _finish(turn)
    return turn.state, tuple(turn.actions)


# -------------------------------------------------------------------------------------------------- the coordinator


def _said(turn: Turn, message: m.FromCoordinator) -> None:
    state = turn.state
    match message:
        case m.Welcome(term=term):
            if term < state.term:
                turn.set(connected=False)
                turn.do(Reconnect())
                return
            turn.set(term=term, heartbeat_seconds=message.heartbeat_seconds)
            node_lease.welcomed(turn, message.lease_seconds)
            if state.notice:
                turn.send(m.Notice(state.notice, max(0.0, state.notice_until - UNSAVED_MARGIN_SECONDS - turn.now)))
            node_attempts.repeat(turn)
            return
        case m.Declined(reason, exit_code):
            _leave_now(turn, exit_code, reason)
            return
        case m.Tell(text):
            turn.do(Show(text))
            return
        case m.Heard(term, sequence):
            node_lease.answered(turn, sequence, term >= state.term)
            return
    if message.term < state.term:
        return  # an older coordinator: it has been fenced, or will be
    match message:
        case m.Prepare(generation=generation):
            if generation > state.generation:
                _prepare(turn, generation)
        case m.Start():
            _start(turn, message)
        case m.Stop(generation=generation, grace_seconds=grace):
            _stop(turn, generation, grace)
        case m.Halt(generation=generation):
            _halt(turn, generation)
        case m.KillRank():
            node_hangs.kill(turn, message)
        case m.Arm():
            node_attempts.arm(turn, message)
        case m.Copy(attempt=attempt):
            node_attempts.copy(turn, attempt)
        case m.Abort(attempt=attempt):
            node_attempts.abort(turn, attempt)
        case m.Committed(attempt=attempt):
            turn.set(committed=max(state.committed, attempt.step))
            mine = node_attempts.over(turn, attempt)
            if mine is not None and state.alive and all(_is_last(worker, attempt.step) for worker in state.alive):
                turn.do(ReleasePages(state.generation, node_attempts.ranks_of(state)))
        case m.Verdict(attempt=attempt, leave=leave):
            if attempt.generation == state.generation:
                if state.snapshot is not None and state.snapshot.attempt == attempt:
                    turn.set(snapshot=replace(state.snapshot, decided=True))
                turn.do(SetVerdict(attempt, leave, node_attempts.ranks_of(state)))
        case m.Release(generation=generation):
            if generation == state.generation:
                turn.do(ReleasePages(state.generation, node_attempts.ranks_of(state)))
        case m.Leave():
            turn.set(leave=message)
            if state.alive:
                turn.set(stopping=True)
                turn.do(Kill(0.0))


def _prepare(turn: Turn, generation: int) -> None:
    store = turn.state.store
    if store is None or store.generation != generation:
        turn.set(store=StoreUp(generation, "", 0))
        turn.do(HostStore(generation))
    elif store.port:
        turn.send(m.StoreReady(generation, store.address, store.port))


def _is_last(worker: Worker, step: int) -> bool:
    """The worker is at its end, and `step` is that end: an older attempt may commit while it waits there."""
    return worker.at_end and worker.looping is not None and worker.looping.total_steps == step


def _start(turn: Turn, start: m.Start) -> None:
    state = turn.state
    survivors = {rank: worker for rank, worker in state.workers.items() if rank in start.survivors}
    others = [worker.rank for worker in state.alive if worker.rank not in survivors]
    ending = state.stopping and any(worker.exit is None for worker in survivors.values())
    if start.generation <= state.generation or others or state.leave is not None or ending:
        return
    ranks = range(start.first_rank, start.first_rank + state.hello.processes)
    # A survivor that died since says so in the report of the generation that it was to go on in.
    workers = {rank: node_workers.going_on(worker, start.generation) for rank, worker in survivors.items()}
    for place, rank in enumerate(ranks):
        if rank not in workers:
            workers[rank] = node_workers.successor(Worker(rank, place, start.generation), state, start)
    turn.set(
        generation=start.generation,
        start=start,
        stopping=False,
        halting=False,
        halt_until=float("inf"),
        workers=dict(sorted(workers.items())),
        keeps=(),  # until it is known what of it is of the history that goes on
        copied={},  # until the coordinator says it again: whoever is on the way back goes first
    )
    if start.line is None:
        # Nobody goes on with what arenas hold, or with an attempt of before.
        committed = start.resume.attempt.step if start.resume is not None else 0
        turn.set(snapshot=None, saving=None, held={}, attempt_seen=0, committed=committed, filling={})
    elif start.fetch is not None and start.line.attempt is not None:
        turn.set(held={})  # its ranks get other arenas, with the snapshot of the line in them
    alive = tuple(rank for rank, worker in survivors.items() if worker.exit is None)
    if alive:
        turn.do(Continue(start, alive))
    if forked := tuple(rank for rank in ranks if rank not in survivors):
        turn.do(Fork(start, forked))
    if len(alive) < len(survivors):
        turn.changed()


def _keeps(turn: Turn, kept: tuple[m.Kept, ...]) -> None:
    before = turn.state.keeps
    turn.set(keeps=kept)
    if turn.state.halting:
        is_awaited = kept != before  # what the run goes on from is being decided
    else:
        is_awaited = not keeping.snapshots_of_all(kept) <= keeping.snapshots_of_all(before)  # the next one may be sent
    if is_awaited:
        turn.changed()


def _halt(turn: Turn, generation: int) -> None:
    """What has been in its loop is to stand still; what has not has nothing that is worth keeping."""
    state = turn.state
    if generation < state.generation or state.stopping:
        return
    is_news = generation > state.generation or not state.halting
    if generation > state.generation:
        _pass_over(turn, generation)
    if not turn.state.halting:
        turn.set(halting=True, halt_until=turn.now + state.halt_seconds)
    alive = turn.state.alive
    _kill(turn, tuple(worker.rank for worker in alive if not worker.looped))
    if moving := tuple(worker.rank for worker in alive if worker.looped and not worker.halted):
        turn.do(RevokePages(generation, moving))
    if is_news:  # an answer to what is said again would have it said again
        turn.changed()


def _kill(turn: Turn, ranks: tuple[int, ...]) -> None:
    for rank in ranks:
        turn.worker(rank, killed=True)
    if ranks:
        turn.do(KillRanks(ranks))


def _pass_over(turn: Turn, generation: int) -> None:
    """The generation's Start never came, and must not be obeyed any more. What ended before it has been judged."""
    for worker in tuple(turn.state.workers.values()):
        if worker.exit is not None:
            turn.worker(worker.rank, exit=msgspec.structs.replace(worker.exit, ordered=True))
    turn.set(generation=generation)


def _stop(turn: Turn, generation: int, grace: float) -> None:
    state = turn.state
    if generation < state.generation:
        return
    if generation > state.generation and not state.alive:
        _pass_over(turn, generation)
        turn.set(start=None, snapshot=None, saving=None, stopping=True, halting=False)
    elif not state.stopping:
        _pass_over(turn, generation)
        turn.set(stopping=True, halting=False)
        if state.alive:
            turn.do(Kill(grace))
    else:
        return  # it was told before, and an answer would have it told again
    turn.changed()


# ---------------------------------------------------------------------------------------------------- time and leaving


def _signalled(turn: Turn, why: str) -> None:
    state = turn.state
    noticed_at = state.notice_until - state.grace_seconds - UNSAVED_MARGIN_SECONDS
    saving = any(worker.joined for worker in state.alive)
    if why == state.notice == "SIGTERM" and saving and turn.now - noticed_at < SAME_NOTICE_SECONDS:
        return
    if state.notice or not state.connected:
        _leave_alone(turn, LEFT_ON[why], f"stopped at once on {why}")
        return
    until = turn.now + state.grace_seconds + UNSAVED_MARGIN_SECONDS
    turn.set(notice=why, notice_until=until)
    turn.do(Show(f"{why}: saving the last finished step; once more to stop at once"))
    turn.send(m.Notice(why, state.grace_seconds))


def _beat(turn: Turn) -> None:
    state = turn.state
    turn.set(beat=state.beat + 1)
    if node_lease.is_silent(state, turn.now):
        node_lease.give_up(turn)
    elif state.connected and state.term:
        node_lease.sends(turn, state.beat + 1)
    turn.send(m.Heartbeat(state.beat + 1, turn.report()))
    node_attempts.repeat(turn)
    if node_lease.is_cut_off(turn.state, turn.now):
        node_lease.halt(turn)
    elif state.halting and turn.now >= state.halt_until:
        turn.set(halt_until=float("inf"))
        _kill(turn, tuple(worker.rank for worker in state.alive if not worker.halted))
    if state.notice and turn.now >= state.notice_until:
        _leave_alone(turn, LEFT_ON[state.notice], "out of time")
    elif not state.connected and turn.now - state.lost_at >= state.coordinator_wait_seconds:
        waited = state.coordinator_wait_seconds
        _leave_alone(turn, ExitCode.UNAVAILABLE, f"no coordinator answered for {waited:.0f} s")


def _leave_alone(turn: Turn, code: ExitCode, summary: str) -> None:
    """Leave without the coordinator's word."""
    turn.set(alone=True)
    _leave_now(turn, code, f"{summary}; the last commit stands" if turn.state.committed else summary)


def _exit_code(state: State, leave: m.Leave) -> int:
    """How a launcher ends that has no worker left. Only now is it known how far those of one that left alone came."""
    joins = state.hello.joins or bool(state.committed)
    exits = [worker.exit for worker in state.workers.values() if worker.exit is not None]
    unsaved = any(recovery.unsaved(exit.step, exit.phase, state.committed, joins) for exit in exits)
    if state.alone and leave.exit_code == ExitCode.PREEMPTED and unsaved:
        return int(ExitCode.PREEMPTED_UNSAVED)
    return leave.exit_code


def _leave_now(turn: Turn, code: int, summary: str) -> None:
    turn.set(leave=m.Leave(turn.state.term, int(code), summary), stopping=True)
    turn.do(Kill(0.0))


def _finish(turn: Turn) -> None:
    """Once told to leave, and once nothing runs here any more, this agent is done."""
    state = turn.state
    if state.leave is None or state.alive:
        return
    for attempt in {attempt for attempt, _ in state.writing}:
        turn.do(CancelPersist(attempt))
    turn.send(m.Goodbye(state.leave.summary[:200] or "done"))
    turn.set(over=True)
    turn.do(Exit(_exit_code(state, state.leave), state.leave.summary))
