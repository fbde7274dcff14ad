"""An agent's workers: what they say, how they end, and what of them goes on into the next generation."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from ftrain.core import local, node_attempts
from ftrain.core import messages as m
from ftrain.core.node_state import State, Turn, Worker


def said(turn: Turn, rank: int, message: local.FromWorker) -> None:
    state = turn.state
    snapshot = state.snapshot
    match message:
        case local.WorkerJoined():
            turn.worker(rank, joined=True)
        case local.WorkerLooping():
            if message.generation not in (0, state.generation):
                return  # it was revoked since
            turn.worker(rank, looping=message, looped=True)
            if all(worker.looping for worker in turn.state.workers.values()):
                turn.changed()
        case local.WorkerPlanned(shard, replays, slots):
            turn.worker(rank, shard=shard, replays=replays, slots=slots)
        case local.WorkerHalted(generation):
            if generation == state.workers[rank].generation:
                turn.worker(rank, halted=message, looping=None)
                if not state.halting or all(worker.halted for worker in turn.state.alive):
                    turn.changed()
        case local.WorkerAtEnd():
            turn.worker(rank, at_end=True)
            if all(worker.at_end for worker in turn.state.workers.values()):
                turn.changed()
        case local.WorkerSealed(number, cost):
            turn.worker(rank, cost=cost)
            node_attempts.unfill(turn, rank)
            if snapshot is not None and snapshot.attempt.number == number and rank not in snapshot.sealed:
                node_attempts.sealed(turn, snapshot, rank)
        case local.WorkerSealFailed(number, cause):
            node_attempts.unfill(turn, rank)
            if snapshot is not None and snapshot.attempt.number == number:
                node_attempts.fail(turn, snapshot, rank, cause)
        case local.WorkerMetrics(done, values):
            turn.send(m.Metrics(state.generation, done, values))
        case local.WorkerError(error):
            turn.worker(rank, error=error)


def exited(turn: Turn, exit: m.RankExit) -> None:
    worker = turn.state.workers.get(exit.rank)
    if worker is None or worker.pid != exit.pid or worker.exit is not None:
        return
    ordered = turn.state.stopping or worker.killed
    turn.worker(exit.rank, exit=_with(exit, worker, ordered))
    node_attempts.unfill(turn, exit.rank)
    turn.changed()


def _with(exit: m.RankExit, worker: Worker, ordered: bool) -> m.RankExit:
    # An exception that was under way when the order came is still the worker's own.
    error = worker.error or exit.error
    own = error is not None and error.unix_seconds > 0 and not exit.signal
    return msgspec.structs.replace(
        exit,
        error=error,
        unix_seconds=error.unix_seconds if error is not None and error.unix_seconds else exit.unix_seconds,
        ordered=ordered and not own,
        shard=worker.shard,
        replays=worker.replays,
        hang=worker.hung if exit.signal and not own else None,
    )


def going_on(worker: Worker, generation: int) -> Worker:
    # One that was told to end, by an order that came late, ended all the same when it was to go on.
    exit = msgspec.structs.replace(worker.exit, ordered=False) if worker.exit is not None else None
    return replace(worker, generation=generation, looping=None, halted=None, at_end=False, exit=exit)


def successor(worker: Worker, state: State, start: m.Start) -> Worker:
    """In place it takes over the very part that the one before it had."""
    before = state.workers.get(worker.rank) if start.line is not None else None
    return replace(worker, shard=before.shard, replays=before.replays) if before is not None else worker
