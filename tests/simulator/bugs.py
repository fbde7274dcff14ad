"""Bugs to plant: each is a mistake that one could make in the core or in a shell. None of them is in ftrain/."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import msgspec

from ftrain.core import (
    commit,
    coordinator,
    ending,
    journal,
    leaving,
    node,
    recovery,
    remains,
    retention,
    rounds,
    run_state,
    schedule,
)

if TYPE_CHECKING:
    from tests.simulator.world import World

Prepare = Callable[["World"], None]


@contextmanager
def planted(name: str) -> Iterator[Prepare | None]:
    """With this bug in place; restores everything afterwards. What is yielded prepares each world."""
    with ExitStack() as stack:
        prepare = BUGS[name](stack) if name else None
        yield prepare


def _fence_left_out(stack: ExitStack) -> None:
    """The name is taken: it will be our own record, surely."""
    real = journal._created

    def created(state: Any, outcome: journal.Outcome, cause: str, now: float, wall: float) -> Any:
        if outcome is journal.Outcome.EXISTS:
            return journal._done(state, wall)
        return real(state, outcome, cause, now, wall)

    stack.enter_context(patch.object(journal, "_created", created))


def _commit_before_the_last_prepare(stack: ExitStack) -> None:
    def complete(state: commit.Barrier) -> commit.Result:
        if state.stage is not commit.Stage.SEALED or len(state.prepared) < max(1, len(state.ranks) - 1):
            return state, ()
        return replace(state, stage=commit.Stage.PREPARED), (commit.Publish(),)

    stack.enter_context(patch.object(commit, "_prepare_if_complete", complete))


def _count_instead_of_names(stack: ExitStack) -> None:
    """As many packs as ranks: two words of one rank will do."""

    def complete(state: commit.Barrier) -> commit.Result:
        if state.stage is not commit.Stage.SEALED or len(state.packs) < len(state.ranks):
            return state, ()
        return replace(state, stage=commit.Stage.PREPARED), (commit.Publish(),)

    def prepare(state: commit.Barrier, event: commit.RankPrepared) -> commit.Result:
        state = replace(state, packs=(*state.packs, event.pack), sealed=state.sealed | {event.pack.rank})
        return commit._seal_if_complete(state) if state.stage is commit.Stage.ARMED else complete(state)

    stack.enter_context(patch.object(commit, "_prepare_if_complete", complete))
    stages = (commit.Stage.PROPOSED, commit.Stage.ARMED, commit.Stage.SEALED)
    stack.enter_context(patch.dict(commit.TABLE, {(stage, commit.RankPrepared): prepare for stage in stages}))


def _record_before_the_manifest(stack: ExitStack) -> None:
    def complete(state: commit.Barrier) -> commit.Result:
        if state.stage is not commit.Stage.SEALED or state.prepared != state.ranks:
            return state, ()
        return replace(state, stage=commit.Stage.RECORDING), (commit.Publish(), commit.WriteCommit())

    stack.enter_context(patch.object(commit, "_prepare_if_complete", complete))


def _abort_while_recording(stack: ExitStack) -> None:
    """The workers are gone, so the attempt is: but its record may be in the journal."""
    events = (commit.WorkersLost, commit.ArenasLost, commit.Expired)
    entries = {(commit.Stage.RECORDING, event): commit._cause for event in events}
    stack.enter_context(patch.dict(commit.TABLE, entries))


def _unknown_treated_as_failed(stack: ExitStack) -> None:
    """No reply to the commit record: give the attempt up."""
    real = run_state.Turn.record

    def record(turn: Any, event: journal.Event) -> Any:
        appender = turn.state.appender
        unknown = isinstance(event, journal.Created) and event.outcome is journal.Outcome.UNKNOWN
        if unknown and appender.record is not None and isinstance(appender.record.body, journal.CommitBody):
            idle = replace(appender, stage=journal.Stage.IDLE, record=None, data=b"", pending=appender.pending[1:])
            barrier = replace(turn.state.writing, stage=commit.Stage.SEALED)
            turn.set(appender=idle, writing=barrier)
            rounds.feed(turn, barrier.attempt, commit.Expired("its record could not be written"))
            return ()
        return real(turn, event)

    stack.enter_context(patch.object(run_state.Turn, "record", record))


def _stale_generation_accepted(stack: ExitStack) -> None:
    """A word about this step is a word about this step."""
    real = rounds.message

    def message(turn: Any, node_name: str, event: Any) -> None:
        for barrier in turn.state.attempts_under_way:
            if event.attempt.step == barrier.attempt.step:
                event = msgspec.structs.replace(event, attempt=barrier.attempt)
        real(turn, node_name, event)

    stack.enter_context(patch.object(rounds, "message", message))


def _attempt_outlives_its_generation(stack: ExitStack) -> None:
    stack.enter_context(patch.object(rounds, "undecided", lambda _turn: False))
    stack.enter_context(patch.object(ending, "awaited", lambda *_: ()))


def _stale_term_obeyed(stack: ExitStack) -> None:
    real = node._said

    def said(turn: Any, message: Any) -> None:
        term = getattr(message, "term", None)
        if term is not None and term < turn.state.term:
            message = msgspec.structs.replace(message, term=turn.state.term)
        real(turn, message)

    stack.enter_context(patch.object(node, "_said", said))


def _retire_before_commit(stack: ExitStack) -> None:
    """Make room first."""
    real = run_state.Turn.append

    def append(turn: Any, body: journal.Body) -> None:
        if isinstance(body, journal.CommitBody):
            history = turn.state.history
            coming = replace(history, commits=(*history.commits, (history.head.sequence + 1, body)))
            for attempt in retention.to_retire(coming, turn.state.policy.checkpoint.keep, turn.state.suspects):
                real(turn, journal.RetireBody(attempt))
        real(turn, body)

    stack.enter_context(patch.object(run_state.Turn, "append", append))


def _delete_before_retire(stack: ExitStack) -> None:
    real = run_state.Turn.append

    def append(turn: Any, body: journal.Body) -> None:
        if isinstance(body, journal.RetireBody):
            turn.do(run_state.Discard(body.attempt))
        real(turn, body)

    stack.enter_context(patch.object(run_state.Turn, "append", append))


def _delete_what_is_referred_to(stack: ExitStack) -> None:
    real = run_state.Turn.record

    def record(turn: Any, event: journal.Event) -> tuple[journal.Record, ...]:
        done = real(turn, event)
        for one in done:
            if isinstance(one.body, journal.RetireBody):
                turn.do(run_state.Discard(one.body.attempt))
        return done

    stack.enter_context(patch.object(run_state.Turn, "record", record))


def _attempt_numbers_used_again(stack: ExitStack) -> None:
    stack.enter_context(patch.object(coordinator, "ATTEMPTS_PER_TERM", 0))


def _directory_not_synced(_: ExitStack) -> Prepare:
    def prepare(world: World) -> None:
        world.storage.sync_directory = False

    return prepare


def _parent_directory_not_synced(_: ExitStack) -> Prepare:
    def prepare(world: World) -> None:
        world.storage.sync_parent = False

    return prepare


def _read_back_not_synced(_: ExitStack) -> Prepare:
    def prepare(world: World) -> None:
        world.storage.sync_before_read = False

    return prepare


def _create_not_exclusive(_: ExitStack) -> Prepare:
    def prepare(world: World) -> None:
        world.storage.exclusive = False

    return prepare


def _sweep_before_the_fence(_: ExitStack) -> Prepare:
    def prepare(world: World) -> None:
        world.sweeps_unfenced = True

    return prepare


def _lost_last_state_is_success(stack: ExitStack) -> None:
    """All ranks ended well: so the run did."""
    stack.enter_context(patch.object(rounds, "lost", lambda _state: ""))


def _unsaved_steps_said_saved(stack: ExitStack) -> None:
    """All ranks have ended, so nothing more can be lost."""
    stack.enter_context(patch.object(leaving, "_nothing_lost", lambda _state, _drain: True))


def _unsaved_steps_said_saved_alone(stack: ExitStack) -> None:
    stack.enter_context(patch.object(node, "_exit_code", lambda _state, leave: leave.exit_code))


def _plan(stack: ExitStack, change: Callable[[Any], Any]) -> None:
    """The line is planned from what each rank has left, as `change` sees it."""
    real = recovery.plan
    stack.enter_context(
        patch.object(recovery, "plan", lambda ranks, held, resume: real([*map(change, ranks)], held, resume))
    )


def _private_state_not_asked_for(stack: ExitStack) -> None:
    """The parameters are what counts."""
    _plan(stack, lambda holder: replace(holder, kept=tuple(range(100))))


def _half_written_state_believed(stack: ExitStack) -> None:
    """Whoever is alive has the state of its last boundary."""
    _plan(stack, lambda holder: replace(holder, live=max(holder.kept, default=-1)) if holder.kept else holder)


def _any_rank_taken_for_a_replica(stack: ExitStack) -> None:
    _plan(stack, lambda holder: replace(holder, shard="all"))


def _snapshot_of_some_ranks_believed(stack: ExitStack) -> None:
    """Who has said nothing will have it, too."""

    def held(state: Any, nodes: frozenset[str]) -> frozenset[Any]:
        return frozenset().union(*(state.report(name).held for name in state.members if name in nodes))

    stack.enter_context(patch.object(remains, "held_by_all", held))


def _attempt_not_waited_for(stack: ExitStack) -> None:
    """It may still be committed, but something older is there already."""
    stack.enter_context(patch.object(ending, "awaited", lambda *_: ()))


def _order_answered_whenever_it_is_heard(stack: ExitStack) -> None:
    """Better once too often."""
    real = node._halt

    def halt(turn: Any, generation: int) -> None:
        real(turn, generation)
        turn.changed()

    stack.enter_context(patch.object(node, "_halt", halt))


def _commit_gives_way_to_itself(stack: ExitStack) -> None:
    """A snapshot is due sooner; but the steps up to where others were before a failure are not taken again."""
    gives_way, after_return = schedule.gives_way, schedule.after_return

    def gives(cadence: Any, step: int, reached: float, _instead: Any) -> bool:
        return gives_way(cadence, step, reached, schedule.Proposal(step, persist=False))

    def returned(cadence: Any, step: int) -> Any:
        return replace(after_return(cadence, step), beyond=cadence.beyond)

    stack.enter_context(patch.object(schedule, "gives_way", gives))
    stack.enter_context(patch.object(schedule, "after_return", returned))


# Where a hunt for a bug that shows seldom aims a fault: the act of a coordinator, and what strikes right after it.
AIMS = {
    "attempt-numbers-used-again": ("arm", "pause coordinator"),
    "sweep-before-the-fence": ("commit", "second coordinator"),
    "stale-term-obeyed": ("arm", "pause coordinator"),
}

BUGS: dict[str, Callable[[ExitStack], Prepare | None]] = {
    "fence-left-out": _fence_left_out,
    "commit-before-the-last-prepare": _commit_before_the_last_prepare,
    "unknown-treated-as-failed": _unknown_treated_as_failed,
    "stale-generation-accepted": _stale_generation_accepted,
    "directory-not-synced": _directory_not_synced,
    "retire-before-commit": _retire_before_commit,
    "count-instead-of-names": _count_instead_of_names,
    "record-before-the-manifest": _record_before_the_manifest,
    "abort-while-recording": _abort_while_recording,
    "attempt-outlives-its-generation": _attempt_outlives_its_generation,
    "stale-term-obeyed": _stale_term_obeyed,
    "delete-before-retire": _delete_before_retire,
    "delete-what-is-referred-to": _delete_what_is_referred_to,
    "attempt-numbers-used-again": _attempt_numbers_used_again,
    "parent-directory-not-synced": _parent_directory_not_synced,
    "read-back-not-synced": _read_back_not_synced,
    "create-not-exclusive": _create_not_exclusive,
    "sweep-before-the-fence": _sweep_before_the_fence,
    "lost-last-state-is-success": _lost_last_state_is_success,
    "unsaved-steps-said-saved": _unsaved_steps_said_saved,
    "unsaved-steps-said-saved-alone": _unsaved_steps_said_saved_alone,
    "private-state-not-asked-for": _private_state_not_asked_for,
    "half-written-state-believed": _half_written_state_believed,
    "any-rank-taken-for-a-replica": _any_rank_taken_for_a_replica,
    "snapshot-of-some-ranks-believed": _snapshot_of_some_ranks_believed,
    "attempt-not-waited-for": _attempt_not_waited_for,
    "commit-gives-way-to-itself": _commit_gives_way_to_itself,
    "order-answered-whenever-it-is-heard": _order_answered_whenever_it_is_heard,
}
