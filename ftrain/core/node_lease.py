"""An agent's own view of its lease: whether it hears of the coordinator, and what follows where it does not.

The coordinator counts the lease from the moment in which it hears a heartbeat. The agent counts it from the moment in
which it sent the newest heartbeat that was answered, which is earlier. So a node that is cut off knows before its place
is given away, whichever direction of the link is cut.

It then looks at its ranks. As long as they come on, they hear their peers, and the coordinator is what is missing: it
will find them at work. Where they wait for peers in vain, this node is cut off: they are made to stand still, and go
on in the generation that begins when the link is healed, if they still may.
"""

from __future__ import annotations

from ftrain.core.hangs import Watch
from ftrain.core.node_state import Reconnect, RevokePages, Show, State, Turn, Worker
from ftrain.core.page import Phase

HELLO = 0  # stands for it among the heartbeats: Welcome answers it
SILENCE_LEASES = 0.5  # a channel is given up that leaves a heartbeat unanswered for so long
STILL_LEASES = 0.5  # ranks wait in vain that stand still for so long,
STILL_STEPS = 2.0  # and for so many of their slowest recent steps, unless they do nothing at all
NEEDS_NO_PEERS = (Phase.BOOT, Phase.DONE)


def connected(turn: Turn) -> None:
    """A Hello is on its way."""
    turn.set(connected=True, unanswered={HELLO: turn.now})


def welcomed(turn: Turn, lease_seconds: float) -> None:
    turn.set(lease_seconds=lease_seconds)
    answered(turn, HELLO, True)


def sends(turn: Turn, sequence: int) -> None:
    """A heartbeat is about to be sent."""
    turn.set(unanswered={**turn.state.unanswered, sequence: turn.now})


def answered(turn: Turn, sequence: int, renews: bool) -> None:
    """The coordinator heard this heartbeat. `renews` says that it is the one that leases are counted by."""
    state = turn.state
    sent_at = state.unanswered.get(sequence)
    if sent_at is None:
        return
    turn.set(unanswered={number: at for number, at in state.unanswered.items() if at > sent_at})
    if renews:
        turn.set(leased_at=max(state.leased_at, sent_at))


def is_silent(state: State, now: float) -> bool:
    """There is a channel, and nothing has come over it for so long that another one should be tried."""
    oldest = min(state.unanswered.values(), default=now)
    return state.connected and now - oldest >= SILENCE_LEASES * state.lease_seconds


def give_up(turn: Turn) -> None:
    """Look for the coordinator anew: a connection over a link that is cut does not end by itself."""
    silent = turn.now - min(turn.state.unanswered.values())
    turn.do(Show(f"the coordinator did not answer for {silent:.1f} s; looking for it anew", "warning"))
    turn.set(connected=False, lost_at=turn.now, unanswered={})
    turn.do(Reconnect())


def is_cut_off(state: State, now: float) -> bool:
    """The lease runs out before the next heartbeat, and all ranks here wait for what does not come."""
    if now + state.heartbeat_seconds < state.leased_at + state.lease_seconds or state.halting or state.stopping:
        return False
    looped = [worker for worker in state.alive if worker.looped and not worker.halted]
    return bool(looped) and all(_waits(worker, state) for worker in looped)


def halt(turn: Turn) -> None:
    """Have the ranks stand still, as on the coordinator's word."""
    state = turn.state
    silent = turn.now - state.leased_at
    text = f"cut off: nothing was heard of the coordinator for {silent:.1f} s, and the ranks here wait for their peers"
    turn.do(Show(f"{text}; they stand still until it is back", "warning"))
    turn.set(halting=True, halt_until=turn.now + state.halt_seconds)
    turn.do(RevokePages(state.generation, tuple(one.rank for one in state.alive if one.looped and not one.halted)))


def _waits(worker: Worker, state: State) -> bool:
    watch = state.watches.get(worker.rank)
    if watch is None or watch.look.excused or watch.look.phase in NEEDS_NO_PEERS:
        return False
    return _stands_still(watch, STILL_LEASES * state.lease_seconds)


def _stands_still(watch: Watch, seconds: float) -> bool:
    slowest = max(watch.look.recent_seconds, default=float("inf"))
    return watch.still_seconds >= max(seconds, STILL_STEPS * slowest) or watch.idle_seconds >= seconds
