"""An agent's part in ending ranks that hang: it sees that one is stopped, and kills what the coordinator names."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ftrain.core import hangs
from ftrain.core import messages as m
from ftrain.core.node_state import DumpStack, KillRanks, Show, State, Turn


def looked(turn: Turn, looks: Mapping[int, hangs.Look]) -> None:
    """Take in how the living workers look. One that was stopped is ended; only this node can see that in time."""
    before = turn.state.watches
    watches = {rank: hangs.watch(before.get(rank), look, turn.now) for rank, look in looks.items()}
    turn.set(watches=watches)
    start = turn.state.start
    for rank, watched in watches.items():
        awaited = start is not None and start.line is not None and rank not in start.survivors
        hang = hangs.stopped_too_long(watched, watches.values(), awaited)
        if hang is not None and _may_hang(turn.state, rank, awaited):
            _condemn(turn, rank, hang)
            turn.do(KillRanks((rank,)))


def kill(turn: Turn, order: m.KillRank) -> None:
    """The coordinator saw a rank hang that others wait for. It may have gone on since."""
    state, rank = turn.state, order.rank
    here = hangs.is_still_at(state.watches.get(rank), order.step, order.collective)
    if order.generation == state.generation and here and _may_hang(state, rank):
        _condemn(turn, rank, order.hang)
        turn.do(DumpStack(rank))


def dumped(turn: Turn, rank: int, pid: int, stack: str) -> None:
    """A rank that hangs has said where it is, or could not."""
    worker = turn.state.workers.get(rank)
    if worker is not None and worker.pid == pid and worker.hung is not None and worker.exit is None:
        turn.worker(rank, hung=msgspec.structs.replace(worker.hung, stack=stack))
        turn.do(KillRanks((rank,)))


def _condemn(turn: Turn, rank: int, hang: m.Hang) -> None:
    turn.worker(rank, hung=hang)
    turn.do(Show(f"rank {rank} hangs and is killed: {hang.text}", "warning"))


def _may_hang(state: State, rank: int, awaited: bool = False) -> bool:
    worker = state.workers.get(rank)
    alive = worker is not None and worker.exit is None and (worker.joined or awaited)
    return alive and worker is not None and not (worker.killed or worker.hung or state.stopping)
