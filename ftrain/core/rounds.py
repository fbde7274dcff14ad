"""The coordinator's checkpoint attempts: when one is proposed, what its barrier asks for, and what follows its end."""

from __future__ import annotations

from dataclasses import replace

from ftrain.core import commit, copying, journal, metrics, recovery, retention, schedule
from ftrain.core import messages as m
from ftrain.core.commit import Barrier
from ftrain.core.run_state import Discard, Phase, Publish, State, Turn

LAST_TRIES = 4  # to commit the last state, before the run ends without it
GAVE_WAY = "something else is to be saved before"


def propose(turn: Turn) -> None:
    """Propose the next attempt if one is due, no snapshot is being taken, and every node's workers are in their loop.

    A commit is not proposed before the last one is written, or given up; snapshots that stay in memory are.
    """
    state = turn.state
    if state.phase is not Phase.RUNNING or not state.recorded or not can_snapshot(turn):
        return
    if state.barrier is not None and not _given_way(turn, state.barrier):
        return
    state = turn.state
    generation = state.generation
    assert generation is not None
    drain = state.drain
    if turn.now < state.cadence.retry_at:
        return
    reports = [state.report(node) for node in state.members]
    total = _total(state)
    done = _last_is_committed(state)
    persist = True
    blocked = state.writing is not None or turn.now < state.cadence.commit_at
    if all(report.at_end for report in reports):
        step, hold = total, False
        if done or state.cadence.last_tries >= LAST_TRIES or state.policy.checkpoint.off:
            turn.to_members(m.Release(state.term, generation.number))
            turn.set(cadence=replace(state.cadence, retry_at=turn.now + state.policy.heartbeat_seconds))
            return
        if blocked:
            return
    elif drain is not None:
        if drain.decided or blocked:
            return
        step, hold = state.furthest + state.cadence.lookahead, True
        if total and step >= total:
            if done:
                return  # its workers are on their way out
            step, hold = total, False
    else:
        found = _due(turn, blocked=blocked)
        if found is None:
            return
        step, hold, persist = found.step, False, found.persist
        if found.put_off and not state.cadence.put_off:
            turn.set(cadence=replace(state.cadence, put_off=found.put_off))
    stays = copying.stays(state, persist, turn.now)
    if not persist and not copying.has_room(state, stays):
        turn.set(cadence=schedule.put_off(turn.state.cadence, turn.now))
        return
    number = state.attempts + 1
    attempt = m.Attempt(generation.number, step, number)
    barrier = Barrier(
        attempt,
        generation.nodes,
        generation.ranks,
        hold,
        persist,
        stays,
        deadline=turn.now + state.policy.checkpoint.attempt_seconds,
    )
    turn.set(barrier=barrier, attempts=number, cost=m.Cost())
    metrics.begin(turn)
    turn.to_members(arm(turn.state, barrier))


def _due(turn: Turn, *, blocked: bool = False) -> schedule.Proposal | None:
    """What the schedule would propose now, were nothing under way; `blocked`: no commit."""
    state = turn.state
    policy = copying.policy(state, turn.now)
    turn.set(cadence=schedule.no_later(policy, state.cadence, turn.now))
    return schedule.next_proposal(policy, turn.state.cadence, state.furthest, _total(state), turn.now, blocked=blocked)


def arm(state: State, barrier: Barrier) -> m.Arm:
    """What nodes are told of the attempt."""
    base = _base(state)
    return m.Arm(
        state.term,
        barrier.attempt,
        barrier.hold,
        barrier.persist,
        barrier.stays,
        base.attempt if base is not None else None,
    )


def copy(turn: Turn) -> None:
    """Have the next snapshot sent to other nodes, if one is to be. Who is not in its loop may not hold it yet."""
    attempt = copying.next_sent(turn.state, turn.now)
    if attempt is not None and can_snapshot(turn):
        turn.set(copying=attempt, copied_at=turn.now)
        turn.to_members(m.Copy(turn.state.term, attempt))


def _base(state: State) -> journal.CommitBody | None:
    """The commit whose packs the attempt under way may refer to: it outlives the attempt, and so does what it needs.

    Only what nothing keeps is ever retired, and the newest sound commit is always kept.
    """
    sound = (body for _, body in reversed(state.history.commits) if body.attempt not in state.suspects)
    newest = next(sound, None)
    return newest if newest is not None and newest.origin is None else None  # one of another run has its files there


def retire(turn: Turn) -> None:
    """Let go of the commits that nothing keeps: after each commit, and when a run goes on that had no time to."""
    state = turn.state
    for attempt in retention.to_retire(state.history, state.policy.checkpoint.keep, state.suspects):
        body = journal.RetireBody(attempt)
        if body not in state.appender.pending:
            turn.append(body)


def _given_way(turn: Turn, barrier: Barrier) -> bool:
    """A commit that is armed for a step far ahead is taken back where a snapshot is due before."""
    state = turn.state
    if barrier.stage is not commit.Stage.ARMED or barrier.hold or barrier.sealed:
        return False
    ahead = copying.steps_per_second(state, turn.now) * 2 * state.policy.heartbeat_seconds
    reached = state.furthest + ahead  # what is known of it is as old as the newest report
    if not schedule.gives_way(state.cadence, barrier.attempt.step, reached, _due(turn)):
        return False
    take_back(turn)
    return True


def take_back(turn: Turn) -> None:
    """Give up, without a word, an attempt that no rank has begun, for something that is to be saved before."""
    barrier = turn.state.barrier
    if barrier is not None and not barrier.hold:
        feed(turn, barrier.attempt, commit.Expired(GAVE_WAY))


def expire(turn: Turn) -> None:
    """Give up what is not done by its deadline."""
    for barrier in turn.state.attempts_under_way:
        if turn.now >= barrier.deadline:
            missing = ", ".join(str(rank) for rank in sorted(barrier.missing)[:8])
            _keep(turn, replace(barrier, deadline=float("inf")))
            feed(turn, barrier.attempt, commit.Expired(f"out of time, waiting for rank {missing}"))


def can_snapshot(turn: Turn) -> bool:
    """Every worker of the generation is alive and in its loop."""
    state = turn.state
    if state.exits or state.gone or not state.members:
        return False
    return all(state.report(node).looping for node in state.members)


def feed_all(turn: Turn, event: commit.Event) -> None:
    """Tell whatever is under way what happened."""
    for barrier in turn.state.attempts_under_way:
        feed(turn, barrier.attempt, event)


def feed(turn: Turn, attempt: m.Attempt, event: commit.Event) -> None:
    """Tell the attempt, if it is under way, what happened, and do what it asks for."""
    found = _under_way(turn.state, attempt)
    if found is None:
        return
    barrier, actions = commit.step(found, event)
    _keep(turn, barrier)
    for action in actions:
        match action:
            case commit.AllArmed():
                _all_armed(turn, barrier)
            case commit.AllSealed():
                _all_sealed(turn, barrier)
            case commit.Publish():
                turn.do(Publish(barrier.attempt, len(barrier.ranks), barrier.packs))
            case commit.WriteCommit():
                payload = sum(pack.payload_bytes for pack in barrier.packs)
                body = journal.CommitBody(
                    barrier.attempt,
                    len(barrier.ranks),
                    barrier.manifest_sha256,
                    payload,
                    refers=tuple(sorted({attempt for pack in barrier.packs for attempt in pack.refers})),
                    metrics=dict(barrier.metrics),
                )
                turn.append(body)
            case commit.AnnounceCommit():
                _committed(turn, barrier)
            case commit.AnnounceAbort():
                _aborted(turn, barrier)


def message(turn: Turn, node: str, event: m.ArmReply | m.Sealed | m.Prepared | m.AttemptFailed) -> None:
    """A node's word about an attempt. About one that is over, the node is told again how it ended."""
    state = turn.state
    if _under_way(state, event.attempt) is None:
        if isinstance(event, m.ArmReply) and not event.accepted:
            return
        if any(body.attempt == event.attempt for _, body in state.history.commits):
            turn.send(node, m.Committed(state.term, event.attempt))
        elif state.term:
            turn.send(node, m.Abort(state.term, event.attempt, "this attempt is over"))
        return
    match event:
        case m.ArmReply(accepted=True):
            feed(turn, event.attempt, commit.Accepted(node))
        case m.ArmReply():
            feed(turn, event.attempt, commit.Refused(node, event.step, event.reason))
        case m.Sealed():
            if state.barrier is not None and event.attempt == state.barrier.attempt:
                turn.set(cost=state.cost.most(event.cost))
            feed(turn, event.attempt, commit.RanksSealed(frozenset(event.ranks)))
        case m.Prepared(pack=pack):
            base = _base(state)
            if set(pack.refers) <= ({base.attempt, *base.refers} if base is not None else set()):
                feed(turn, event.attempt, commit.RankPrepared(pack))
            else:
                cause = "its pack refers to what the newest commit does not have"
                feed(turn, event.attempt, commit.RankFailed(pack.rank, cause))
        case m.AttemptFailed():
            feed(turn, event.attempt, commit.RankFailed(event.rank, event.cause))


def lost(state: State) -> str:
    """What a run that has come to its end leaves uncommitted, and why, in one line; "" when it leaves nothing."""
    reports = [state.report(node) for node in state.members]
    off = state.policy.checkpoint.off
    if off or _last_is_committed(state) or not all(report.at_end for report in reports):
        return ""  # a script that left its loop before its end, or takes no checkpoints, has no last state
    why = f": {' '.join(state.cadence.cause.split())}" if state.cadence.cause else ""
    return (
        f"finished, but the last state, of step {_total(state)}, could not be committed{why}; "
        f"{recovery.standing(state.history, state.suspects)}"
    )


def _total(state: State) -> int:
    """The step that the run's loop ends with, 0 when it is endless or unknown."""
    return max((state.report(node).total_steps for node in state.members), default=0)


def _last_is_committed(state: State) -> bool:
    line = recovery.recovery_line(state.history, state.suspects)
    return line is not None and line.attempt.step == _total(state)


def undecided(turn: Turn) -> bool:
    """Something is under way whose outcome may still be a commit."""
    return bool(turn.state.attempts_under_way)


def _under_way(state: State, attempt: m.Attempt) -> Barrier | None:
    return next((barrier for barrier in state.attempts_under_way if barrier.attempt == attempt), None)


def _keep(turn: Turn, barrier: Barrier) -> None:
    """What has become of an attempt: from the moment that it is sealed it is in nobody's way but the next commit's."""
    state = turn.state
    taken = state.barrier
    if taken is None or taken.attempt != barrier.attempt:
        turn.set(writing=None if barrier.is_over else barrier)
    elif barrier.is_taken:
        turn.set(barrier=None, writing=replace(barrier, metrics=state.logged))
    else:
        turn.set(barrier=None if barrier.is_over else barrier)


def _all_armed(turn: Turn, barrier: Barrier) -> None:
    drain = turn.state.drain
    if not barrier.hold:
        return
    leave = drain is not None
    if drain is not None:
        turn.set(drain=replace(drain, decided=True))
    turn.to_members(m.Verdict(turn.state.term, barrier.attempt, leave))


def _all_sealed(turn: Turn, barrier: Barrier) -> None:
    turn.set(held=barrier.attempt, cadence=schedule.paced(turn.state.cadence, turn.state.cost))
    cadence = schedule.after_snapshot(copying.policy(turn.state, turn.now), turn.state.cadence, turn.now)
    turn.set(cadence=cadence)
    turn.set(cadence=schedule.after_taken(cadence, barrier.attempt.step))


def _committed(turn: Turn, barrier: Barrier) -> None:
    state = turn.state
    cadence = schedule.after_commit(state.policy.checkpoint, state.cadence, barrier.attempt.step, turn.now)
    turn.set(cadence=cadence)
    turn.to_members(m.Committed(state.term, barrier.attempt))
    payload = sum(pack.payload_bytes for pack in barrier.packs)
    size = f"{payload / 1e6:.1f} MB, {len(barrier.packs)} packs"
    turn.log(f"checkpoint of step {barrier.attempt.step} committed ({size})")
    drain = turn.state.drain
    if drain is not None:
        turn.set(drain=replace(drain, saved=drain.decided or barrier.hold))
    retire(turn)


def _aborted(turn: Turn, barrier: Barrier) -> None:
    state = turn.state
    last = barrier.attempt.step == _total(state)
    came_late = barrier.refused_step >= 0 and not last  # after the last step there is no later one to try
    # A snapshot for which a node has no slot yet is none that failed.
    is_put_off = barrier.refused and not barrier.persist and not came_late
    if came_late:
        cadence = schedule.after_refusal(state.cadence, barrier.refused_step)
    elif is_put_off:
        cadence = schedule.put_off(state.cadence, turn.now)
    elif barrier.cause == GAVE_WAY:
        cadence = state.cadence
    else:
        taken = barrier.sealed == barrier.ranks
        cadence = schedule.after_failure(state.cadence, turn.now, barrier.cause, last, taken)
        if cadence.last_tries >= LAST_TRIES and all(state.report(node).at_end for node in state.members):
            # Nothing is tried any more that a pause could help.
            cadence = replace(cadence, retry_at=turn.now, commit_at=turn.now)
    turn.set(cadence=cadence)
    turn.to_members(m.Abort(state.term, barrier.attempt, barrier.cause))
    if barrier.hold and barrier.accepted != barrier.nodes:  # else they were told to leave, and that stands
        turn.to_members(m.Verdict(state.term, barrier.attempt, leave=False))
    if barrier.persist:
        turn.do(Discard(barrier.attempt))
    quietly = came_late or is_put_off or barrier.cause == GAVE_WAY
    if not quietly and state.phase is Phase.RUNNING:
        step = barrier.attempt.step
        stands = recovery.standing(state.history, state.suspects)
        what = "checkpoint" if barrier.persist else "snapshot"
        turn.log(f"{what} of step {step} given up: {barrier.cause}; {stands}", "warning")
