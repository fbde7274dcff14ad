"""How often snapshots are kept in memory, which of them go to other nodes, and which the arenas keep for that.

What a rank holds and no other one does is lost with it, but for its newest snapshot: so there is one after each step,
as far as that costs little. What no other *node* has is lost with the node, but for the newest snapshot that all nodes'
keepers have of it, and that the others' arenas still hold: one snapshot at a time is sent, the one that was sent before
stays meanwhile, and a third slot is there for those in between; a fourth where they are sent one after the other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import ceil

from ftrain.core import keeping
from ftrain.core import messages as m
from ftrain.core.node_state import SLOTS_MIN
from ftrain.core.run_state import State
from ftrain.core.schedule import CheckpointPolicy

SLOTS = 3  # one holds what all go on from, one what is on other nodes or on its way there, one is being filled
COPY_SECONDS = 10.0  # from one snapshot that is sent to the next, at the least
COPY_PARTS = 100  # of that time, sending one may take a processor from training for one in so many
RETURN_SECONDS = 1.0  # after all have come back from a failure, processors are for training
SPARED_SECONDS = 10.0  # that the one sent before stays while the next one is on its way, at most


def slots_wanted(state: State) -> int:
    """Of the arena of a rank of the generation that begins, should it hold what no other rank has."""
    given, sent = state.policy.checkpoint, _has_keepers(state)
    if not given.snapshots or (given.off and not sent):
        return SLOTS_MIN
    one_after_the_other = not given.snapshot_auto and given.snapshot_seconds < COPY_SECONDS
    return SLOTS + 1 if sent and one_after_the_other else SLOTS


def policy(state: State, now: float) -> CheckpointPolicy:
    """The run's, where snapshots in memory are as frequent as they are to be for what its ranks hold."""
    given = state.policy.checkpoint
    if not given.snapshot_auto or not _is_rare(state) or not _has_memory(state):
        return given
    if is_sent(state) and _slots(state) < SLOTS:
        return given
    steps = max(1, ceil(state.cadence.pace_seconds * steps_per_second(state, now)))
    return replace(given, snapshot_steps=steps, snapshot_seconds=0.0)


def is_sent(state: State) -> bool:
    """Snapshots go to other nodes: of some of the state there is nothing but that on more nodes than one."""
    if not _has_keepers(state):
        return False
    first: dict[str, str] = {}  # shard -> a node that has it
    elsewhere: set[str] = set()  # shards that another has, too
    for name in state.members:
        for rank in state.report(name).ranks:
            if first.setdefault(rank.shard, name) != name:
                elsewhere.add(rank.shard)
    return "" in first or len(elsewhere) < len(first)


def next_sent(state: State, now: float) -> m.Attempt | None:
    """The snapshot that is to go to other nodes now, if one is: the newest, when it is sealed or the last one is there.

    One at a time, where there is memory for that. A commit's is always due, and where it could not be sent at once,
    the next one that can: what is lost with a node is older in memory than in storage otherwise, and would have to be
    read from storage.
    """
    newest, copying = state.held, state.copying
    if newest is None or newest == copying or not _is_of_use(state, newest) or _is_too_soon(state, newest, now):
        return None
    if copying is not None and _is_of_use(state, copying) and _slots(state) >= SLOTS:
        writing = state.writing
        # Whoever says how often there is a snapshot means that it outlives its node.
        is_due = not state.policy.checkpoint.snapshot_auto or now >= state.copied_at + _copy_seconds(state)
        if not is_due and (writing is None or copying.step >= writing.attempt.step):
            return None
        if copying != _safe(state) and _is_held(state, copying):
            return None  # it is on its way
    return newest if is_sent(state) else None


def stays(state: State, persist: bool, now: float) -> tuple[m.Attempt, ...]:
    """The snapshots that arenas keep while the next one is taken. A commit waits for none but the newest."""
    found = {state.held} if state.held is not None else set()
    if state.writing is not None:
        found.add(state.writing.attempt)
    if _slots(state) >= SLOTS and is_sent(state):
        copying, safe = state.copying, _safe(state)
        if copying is not None and _is_of_use(state, copying):
            found.add(copying)
        spared = copying is None or now < state.copied_at + SPARED_SECONDS
        if safe is not None and _is_of_use(state, safe) and spared and not persist:
            found.add(safe)
    return tuple(sorted(found))


def has_room(state: State, kept: tuple[m.Attempt, ...]) -> bool:
    """Whether there is a slot besides those that stay."""
    return len(kept) < _slots(state)


def steps_per_second(state: State, now: float) -> float:
    """On the whole, since all ranks have been in their loop; 0 where it is not known yet."""
    ran = now - state.looping_since
    first = min((state.report(node).first_step for node in state.members), default=0)
    return max(0.0, (state.furthest - first) / ran) if ran > 0 else 0.0


def _is_rare(state: State) -> bool:
    """Some rank holds what no other one does, as far as all have said, and others would go on without it."""
    ranks = Counter(rank.shard for name in state.members for rank in state.report(name).ranks)
    return ranks.total() > 1 and "" not in ranks and min(ranks.values()) < 2


def _has_memory(state: State) -> bool:
    """A rank that still reserves its arena would have to wait for that at its next snapshot."""
    return all(rank.slots for name in state.members for rank in state.report(name).ranks)


def _slots(state: State) -> int:
    return min(
        (rank.slots or SLOTS_MIN for name in state.members for rank in state.report(name).ranks), default=SLOTS_MIN
    )


def _is_of_use(state: State, attempt: m.Attempt) -> bool:
    """No commit is newer."""
    commits = state.history.commits
    return not commits or commits[-1][1].attempt.step <= attempt.step


def _is_too_soon(state: State, newest: m.Attempt, now: float) -> bool:
    """The ranks are hardly back, and what they went on from will soon be older than the next snapshot."""
    if state.line is None or state.copying is not None:
        return False
    is_asked_for = not state.policy.checkpoint.snapshot_auto and newest != state.line.attempt
    return not is_asked_for and now < state.looping_since + RETURN_SECONDS


def _is_held(state: State, attempt: m.Attempt) -> bool:
    """By the arenas of all nodes, as far as is known."""
    return attempt == state.held or all(attempt in state.report(name).held for name in state.members)


def _copy_seconds(state: State) -> float:
    taken = max((state.report(name).sending_seconds for name in state.members), default=0.0)
    return max(COPY_SECONDS, COPY_PARTS * taken)


def _safe(state: State) -> m.Attempt | None:
    """The newest snapshot that survives the loss of any one node."""
    generation = state.generation
    if generation is None:
        return None
    copies = keeping.by_rank({name: state.report(name) for name in state.members})
    each = [
        frozenset(state.report(member.node).held) & keeping.snapshots_of(member, keeping.holder_of(member, copies)[1])
        for member in generation.members
    ]
    return max(frozenset.intersection(*each), default=None, key=lambda attempt: (attempt.step, attempt))


def _has_keepers(state: State) -> bool:
    generation = state.generation
    return generation is not None and any(
        keeping.keeper(generation, state.nodes, member) is not None for member in generation.members
    )
