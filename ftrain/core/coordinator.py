"""Everything that the coordinator decides, as one pure state machine.

`step(state, event, now)` takes what happened and returns the new state and what to do about it. The service around it
owns sockets, storage and the clock; the simulator is another such service. What deserves a page of its own is next
door: who is here (`membership`), what a failure means (`supervision`), checkpoint attempts (`rounds`, `commit`,
`schedule`), the one history (`journal`), what to start from (`recovery`).

Rules that hold throughout: nothing is decided before this coordinator's `run` record is in the journal (its sequence
number is the coordinator's *term*); a generation is in the journal before any of its workers starts; and once the
journal says that somebody else continued the history, this coordinator sends nothing more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec

from ftrain.core import commit, journal, leaving, membership, reception, recovery, rounds, supervision
from ftrain.core import messages as m
from ftrain.core.journal import History
from ftrain.core.membership import Generation, Member, Node
from ftrain.core.run_state import (
    Action,
    Begin,
    Continues,
    Discard,
    Disconnected,
    Event,
    Interrupted,
    Log,
    Phase,
    Published,
    Received,
    Resumed,
    RunPolicy,
    State,
    Stored,
    Tick,
    Turn,
)
from ftrain.core.schedule import Cadence
from ftrain.core.supervision import Failure, FailureClass
from ftrain.errors import ExitCode

ATTEMPTS_PER_TERM = 1_000_000  # an adopted generation's attempts are numbered from its coordinator's term times this
STUMBLES_MAX = 3  # recoveries in place that failed in a row, before all ranks are forked anew
RECONNECT_SECONDS = 2.0  # how long a stopping generation waits for the report of a node whose channel broke


def initial(policy: RunPolicy, history: History, writer: str) -> State:
    """A coordinator that has read the journal and decided nothing yet. `writer` is unique for this life of it."""
    number = history.generation.generation if history.generation else 0
    state = State(policy, history, journal.Appender(writer, history.head), number=number)
    return msgspec.structs.replace(state, judged_commit=state.newest_commit)


def step(state: State, event: Event, now: float, wall: float = 0.0) -> tuple[State, tuple[Action, ...]]:
    """One event, one decision. `now` is monotonic seconds, `wall` Unix seconds for the records that people read."""
    turn = Turn(state, now, wall)
    if state.phase is Phase.OVER:
        return state, ()
    match event:
        case Begin():
            turn.append(journal.RunBody(state.policy.run_id, state.job_sha256, state.policy.version))
        case Received(node, message):
            reception.received(turn, node, message)
        case Disconnected(node):
            reception.disconnected(turn, node)
        case Stored(reply):
            for record in turn.record(reply):
                _recorded(turn, record)
        case Published(attempt, manifest_sha256, cause):
            _published(turn, attempt, manifest_sha256, cause)
        case Tick():
            pass
    _expire(turn)
    _advance(turn)
    return turn.state, tuple(turn.actions)


def wake_at(state: State, now: float) -> float:
    """When a `Tick` is due next. What was due by `now` has been done by the step that ended then."""
    times = [state.until, state.appender.retry_at if state.appender.stage is journal.Stage.WAITING else float("inf")]
    times += [node.lease_until for node in state.nodes.values()]
    if state.phase is Phase.FORMING:
        times.append(state.probe_at)
    if state.barrier is not None:
        times.append(state.barrier.deadline)
    elif state.phase is Phase.RUNNING:
        times += [state.cadence.due, state.cadence.retry_at]
    if state.drain is not None:
        times.append(state.drain.deadline)
    return min((time for time in times if time > now), default=float("inf"))


# -------------------------------------------------------------------------------------------------- storage and time


def _recorded(turn: Turn, record: journal.Record) -> None:
    match record.body:
        case journal.RunBody():
            turn.set(term=record.sequence)
            _take_over(turn)
        case journal.GenerationBody(generation=number):
            if number == turn.state.number:
                turn.set(recorded=True)
        case journal.CommitBody(attempt=attempt):
            barrier = turn.state.barrier
            assert barrier is not None and barrier.attempt == attempt, "only the attempt under way is ever recorded"
            rounds.feed(turn, commit.Recorded())
        case journal.RetireBody(attempt=attempt):
            turn.do(Discard(attempt))
        case journal.FinishBody():
            leaving.let_go(turn)


def _take_over(turn: Turn) -> None:
    """The history is ours. Is its last generation still running somewhere?"""
    state = turn.state
    last = state.history.generation
    turn.set(waiting_since=turn.now)
    if last is None or state.history.finish is not None:
        turn.enter(Phase.FORMING)
    else:
        members = tuple(
            Member(member.node, member.node_rank, place, member.first_rank, member.processes)
            for place, member in enumerate(last.members)
        )
        turn.set(generation=Generation(last.generation, members), recorded=True)
        turn.enter(Phase.ADOPTING, turn.now + state.policy.lease_seconds)
        ranks = {member.node_rank: member.node for member in members if member.node_rank >= 0}
        present = [(node.hello.node_rank, node.name) for node in state.nodes.values()]
        gone = {ranks[rank] for rank, name in present if ranks.get(rank, name) != name}
        turn.set(gone=frozenset(gone))
    for node in state.nodes:
        reception.welcome(turn, node)
    if state.drain is not None:
        leaving.drained(turn)


def _published(turn: Turn, attempt: m.Attempt, manifest_sha256: str, cause: str) -> None:
    barrier = turn.state.barrier
    if barrier is None or barrier.attempt != attempt or barrier.stage is not commit.Stage.PREPARED:
        return
    rounds.feed(turn, commit.Published(manifest_sha256) if manifest_sha256 else commit.PublishFailed(cause))


def _expire(turn: Turn) -> None:
    """Leases and deadlines that have run out by now."""
    for name, node in tuple(turn.state.nodes.items()):
        if turn.now >= node.lease_until:
            where, lease = reception.place(turn, name), turn.state.policy.lease_seconds
            reception.lose(turn, name, f"node {where} was silent for {lease:.0f} s: its lease ran out")
    barrier = turn.state.barrier
    if barrier is not None and turn.now >= barrier.deadline:
        missing = ", ".join(str(rank) for rank in sorted(barrier.missing)[:8])
        turn.set(barrier=replace(barrier, deadline=float("inf")))
        rounds.feed(turn, commit.Expired(f"out of time, waiting for rank {missing}"))
    for record in turn.record(journal.Retry()):
        _recorded(turn, record)
    leaving.expire(turn)


# --------------------------------------------------------------------------------------------------------- generations


def _advance(turn: Turn) -> None:
    """Take every step that the present state allows."""
    before = None
    while before is not turn.state.phase and turn.state.phase is not Phase.OVER:
        before = turn.state.phase
        match before:
            case Phase.OPENING | Phase.CLOSING | Phase.OVER:
                pass
            case Phase.ADOPTING:
                _adopt(turn)
            case Phase.FORMING:
                _form(turn)
            case Phase.STARTING:
                _starting(turn)
            case Phase.RUNNING:
                _running(turn)
            case Phase.HALTING:
                _halting(turn)
            case Phase.STOPPING:
                _stopping(turn)
            case Phase.SETTLING:
                if not _waits_for_attempt(turn) or turn.now >= turn.state.until:
                    _judge(turn)
            case Phase.PAUSING:
                if turn.now >= turn.state.until:
                    turn.set(waiting_since=turn.now)
                    turn.enter(Phase.FORMING)
            case Phase.LEAVING:
                leaving.leaving(turn)


def _adopt(turn: Turn) -> None:
    state = turn.state
    generation = state.generation
    assert generation is not None
    reports = [state.report(node) for node in state.members]
    whole = all(
        member.node in state.nodes
        and len(report.ranks) + len(report.exits) == member.processes
        and all(exit.ok for exit in report.exits)
        and not report.halted
        for member, report in zip(generation.members, reports, strict=True)
    )
    if whole and not state.gone:
        last = state.history.generation
        assert last is not None
        resume = next(
            (recovery.resume_from(seq, body) for seq, body in state.history.commits if body.attempt == last.resumes),
            None,
        )
        # A former coordinator may have proposed numbers that no node has seen, and may still want to delete their
        # files.
        attempts = max(state.term * ATTEMPTS_PER_TERM, *(report.attempt_seen for report in reports))
        held = max(_held(state, _connected(state)), default=None)
        turn.set(attempts=attempts, resume=resume, cadence=Cadence(due=turn.now), held=held)
        turn.log(f"generation {generation.number} is still running on all nodes: carrying on with it")
        turn.enter(Phase.RUNNING)
        for node in state.members:
            reception.resync(turn, node, state.report(node))
    elif (
        state.gone
        or turn.now >= state.until
        or all(name in state.nodes and _knows(state, name) for name in state.members)
    ):
        turn.set(gone=state.gone | (generation.nodes - set(state.nodes)))
        if turn.state.gone and any(report.ranks or report.exits for report in reports):
            lost = ", ".join(str(member.group_rank) for member in generation.members if member.node in turn.state.gone)
            why = f"node {lost} was lost with the coordinator"
            turn.set(failure=Failure(FailureClass.NODE, lost, why))
        turn.set(failed_at=turn.now)
        turn.set(attempts=state.term * ATTEMPTS_PER_TERM)
        _end(turn, "not all of it is alive")


def _form(turn: Turn) -> None:
    state = turn.state
    nodes = [replace(node, busy_generation=_busy(state, node.name)) for node in state.nodes.values()]
    # A node may have been told of numbers that never came into the journal: it would not obey them a second time.
    number = 1 + max([state.number, *(report.generation for report in state.reports.values())])
    found = membership.form(state.policy.formation, nodes, state.generation, number, state.waiting_since, turn.now)
    match found:
        case membership.Wait(until):
            turn.set(until=until)
            if turn.now >= state.probe_at:
                # Whoever waits writes nothing, and would not notice that the nodes it waits for follow somebody else.
                turn.set(probe_at=turn.now + state.policy.lease_seconds)
                turn.record(journal.Probe())
        case membership.TimedOut(have, need):
            waited = state.policy.formation.wait_seconds
            leaving.close(turn, ExitCode.UNAVAILABLE, f"only {have} of {need} nodes were there after {waited:.0f} s")
        case Generation():
            survivors = _survivors(state, found.nodes)
            line = recovery_line(state, found.nodes)
            assert state.generation is not None or not survivors
            if survivors and (
                line is None or state.generation is None or not membership.same_places(state.generation, found)
            ):
                _stop(turn, "nothing of it can go on in place")
            else:
                _begin(turn, found, line, survivors)


def _busy(state: State, node: str) -> int:
    report = state.reports.get(node)
    idle = report is None or report.stopped or (report.halted and not state.scrapped)
    return 0 if idle or report is None else report.generation


def _connected(state: State) -> frozenset[str]:
    return frozenset(name for name, node in state.nodes.items() if node.connected)


def recovery_line(state: State, nodes: frozenset[str]) -> m.Line | None:
    """What ranks on these nodes, that are left of the present generation, can go on from in place; None without any."""
    generation = state.generation
    if generation is None or not _survivors(state, nodes):
        return None
    holders: list[recovery.Holder] = []
    for member in generation.members:
        report = state.report(member.node) if member.node in nodes else m.Report()
        alive = {rank.rank: rank for rank in report.ranks if rank.halted}
        ended = {exit.rank: exit for exit in report.exits}
        for rank in member.ranks:
            if (one := alive.get(rank)) is not None:
                holders.append(recovery.Holder(rank, one.shard, one.live, one.kept, one.replays))
            elif (gone := ended.get(rank)) is not None:
                holders.append(recovery.Holder(rank, gone.shard, -1, gone.kept, gone.replays))
            else:
                holders.append(recovery.Holder(rank))
    commit_of_run = recovery.recovery_line(state.history, state.suspects)
    return recovery.plan(holders, _held(state, nodes), commit_of_run)


def _survivors(state: State, nodes: frozenset[str]) -> frozenset[int]:
    """The ranks on these nodes that stand still and may go on in place."""
    if state.scrapped:
        return frozenset()
    reports = [state.report(name) for name in state.members if name in nodes]
    return frozenset(rank.rank for report in reports for rank in report.ranks if rank.halted)


def _held(state: State, nodes: frozenset[str]) -> frozenset[m.Attempt]:
    """The snapshots that every member of the generation still has in its arenas, as far as these are the nodes left."""
    each = [frozenset(state.report(name).held) if name in nodes else frozenset() for name in state.members]
    return frozenset.intersection(*each) - state.spoiled


def _begin(turn: Turn, generation: Generation, line: m.Line | None, survivors: frozenset[int]) -> None:
    """The generation is formed: into the journal with it, while rank 0's node prepares its store."""
    state = turn.state
    resume = recovery.recovery_line(state.history, state.suspects)
    if resume is None and state.suspects:
        leaving.close(
            turn, ExitCode.STORAGE, "every commit of this run is damaged; nothing was deleted, mend or remove it"
        )
        return
    if state.judged:
        _announce(turn, generation, line, resume, survivors)
    policy = state.policy.checkpoint
    turn.set(
        generation=generation,
        number=generation.number,
        recorded=False,
        store=None,
        resume=resume,
        line=line,
        survivors=survivors,
        exits={},
        gone=frozenset(),
        failure=None,
        judged=False,
        scrapped=False,
        looping_since=0.0,
    )
    if line is None:
        cadence = Cadence(due=turn.now + policy.every_seconds, snapshot_due=turn.now + policy.snapshot_seconds)
        turn.set(attempts=0, cadence=cadence, held=None)
    turn.enter(Phase.STARTING)
    members = tuple(
        journal.MemberRecord(
            member.node, member.node_rank, member.first_rank, member.processes, state.nodes[member.node].hello.host
        )
        for member in generation.members
    )
    why = state.failure.summary if state.failure else ""
    turn.append(
        journal.GenerationBody(
            generation.number,
            generation.world_size,
            members,
            resume.attempt if resume else None,
            why,
            line.step if line is not None else -1,
        )
    )
    turn.send(generation.members[0].node, m.Prepare(state.term, generation.number))


def _announce(
    turn: Turn, generation: Generation, line: m.Line | None, resume: m.Resume | None, survivors: frozenset[int]
) -> None:
    tier = line.tier if line is not None else m.Tier.STORAGE if resume is not None else None
    step = line.step if line is not None else resume.attempt.step if resume is not None else 0
    kept = len(survivors)
    forked = generation.world_size - kept
    turn.do(Continues(generation.number, step, _furthest(turn.state), tier, kept, forked))


def _starting(turn: Turn) -> None:
    state = turn.state
    if state.drain is not None and (state.line is None or state.gone):
        leaving.drained(turn)
    elif state.gone:
        if state.line is not None:
            _end(turn, "a node was lost before it began")
        else:
            turn.set(waiting_since=turn.now)
            turn.enter(Phase.FORMING)
    elif state.recorded and state.store is not None and state.generation is not None:
        turn.set(started_at=turn.now)
        turn.enter(Phase.RUNNING)
        step = state.line.step if state.line is not None else state.resume.attempt.step if state.resume else 0
        start = f"from step {step}" if step else "from the beginning"
        turn.log(
            f"generation {state.number}: {len(state.members)} node(s), {state.generation.world_size} rank(s), {start}"
        )
        for member in state.generation.members:
            reception.start_node(turn, member)


def _running(turn: Turn) -> None:
    state = turn.state
    generation = state.generation
    assert generation is not None
    leaving_now = state.drain is not None and state.drain.decided
    failed = [
        exit
        for _, exit in state.exits.values()
        if exit.failed and not (leaving_now and exit.code == ExitCode.PREEMPTED and not exit.signal)
    ]
    # Nobody here has ordered a stop: a former coordinator did, when it did not know yet that it was one.
    halted = [node for node in state.members if _knows(state, node) and _is_over(state.report(node))]
    cut = [(node, rank) for node in state.members for rank in state.report(node).ranks if rank.halted]
    if failed or state.gone or halted or cut:
        if state.failure is None and failed:
            turn.set(failure=supervision.explain(state.exits[failed[0].rank][0], failed[0]))
        elif state.failure is None and halted:
            why = f"node {reception.place(turn, halted[0])} was stopped by a former coordinator"
            turn.set(failure=Failure(FailureClass.NODE, halted[0], why))
        elif state.failure is None and cut:
            node, rank = cut[0]
            why = f"rank {rank.rank} lost its peers after step {rank.step}"
            turn.set(failure=Failure(FailureClass.LINK, node, why, rank.rank, rank.step))
        turn.set(failed_at=turn.now)
        assert turn.state.failure is not None or state.drain is not None
        _end(turn, turn.state.failure.summary if turn.state.failure else "the run is leaving")
    elif len(state.exits) == generation.world_size:
        if rounds.undecided(turn):
            return
        if state.drain is not None and any(not exit.ok for _, exit in state.exits.values()):
            leaving.drained(turn)
        else:
            leaving.finished(turn)
    else:
        if state.failed_at and rounds.can_snapshot(turn):
            first = min(state.report(node).first_step for node in state.members)
            turn.do(Resumed(generation.number, first, turn.now - state.failed_at))
            turn.set(failed_at=0.0)
        if not state.looping_since and rounds.can_snapshot(turn):
            turn.set(looping_since=turn.now, stumbles=0)
        rounds.propose(turn)


def _knows(state: State, node: str) -> bool:
    """The node has reported about the present generation."""
    return state.report(node).generation == state.number


def _is_over(report: m.Report) -> bool:
    """Nothing of the report's generation trains any more."""
    return report.stopped or report.halted


def _end(turn: Turn, why: str) -> None:
    """End the present generation: its workers stand still where something may go on in place, otherwise they go."""
    state = turn.state
    generation = state.generation
    assert generation is not None
    survives = any(rank.looped for name in state.members for rank in state.report(name).ranks)
    if state.phase is Phase.STARTING:
        survives = bool(state.survivors)  # their reports are of the generation before
    ended = any(exit.ok for _, exit in state.exits.values())
    stumbles = state.stumbles + (state.line is not None and not state.looping_since)
    turn.set(stumbles=stumbles)
    if state.drain is not None or not survives or ended or stumbles > STUMBLES_MAX:
        _stop(turn, why)
        return
    turn.enter(Phase.HALTING, turn.now + state.policy.halt_seconds + state.policy.lease_seconds)
    for node in state.members:
        reception.halt_node(turn, node, generation.number, why)
    _workers_lost(turn, generation, why)


def _workers_lost(turn: Turn, generation: Generation, why: str) -> None:
    """The attempt under way learns that no rank will seal it any more, but for what is sealed by then."""
    rounds.feed(turn, commit.WorkersLost(generation.ranks, why))
    rounds.feed(turn, commit.ArenasLost(_ranks(generation, turn.state.gone), why))


def _stop(turn: Turn, why: str) -> None:
    """End the present generation: all of its workers go, what they sealed may still be committed."""
    state = turn.state
    generation = state.generation
    assert generation is not None
    turn.set(scrapped=True)
    turn.enter(Phase.STOPPING, turn.now + state.policy.stop_grace_seconds + state.policy.lease_seconds)
    for node in state.members:
        reception.stop_node(turn, node, generation.number, why)
    _workers_lost(turn, generation, why)


def _ranks(generation: Generation, nodes: frozenset[str]) -> frozenset[int]:
    return frozenset(rank for member in generation.members if member.node in nodes for rank in member.ranks)


def _halting(turn: Turn) -> None:
    """Wait until everything of the generation stands still or is gone."""
    missing = _missing(turn, _is_over)
    if missing and turn.now >= turn.state.until:
        _stop(turn, "not all of it came to a halt")
    elif not missing:
        turn.enter(Phase.SETTLING, turn.now + turn.state.policy.settle_seconds)


def _stopping(turn: Turn) -> None:
    """Wait until every member that can still answer has said that nothing of the generation runs there."""
    missing = _missing(turn, lambda report: report.stopped)
    if not missing or turn.now >= turn.state.until:
        turn.enter(Phase.SETTLING, turn.now + turn.state.policy.settle_seconds)


def _missing(turn: Turn, is_done: Callable[[m.Report], bool]) -> list[Node]:
    """The members of the generation that can still answer, and have not said that they are done with it."""
    state = turn.state
    generation = state.generation
    assert generation is not None
    missing = []
    for name in state.members:
        node = state.nodes.get(name)
        if node is None or (_knows(state, name) and is_done(state.report(name))):
            continue
        if _never_started(state, name):
            continue
        lease = state.policy.lease_seconds
        if not node.connected and turn.now >= node.lease_until - lease + min(RECONNECT_SECONDS, lease):
            continue  # its workers may live on, but they are fenced: nothing of theirs can be committed
        missing.append(node)
    silent = [node for node in missing if not node.connected]
    if silent and turn.now < state.until:
        grace = min(RECONNECT_SECONDS, state.policy.lease_seconds)
        turn.set(until=min(state.until, *(n.lease_until - state.policy.lease_seconds + grace for n in silent)))
    return missing


def _never_started(state: State, node: str) -> bool:
    """The node has reported since, and knows nothing of the present generation."""
    report = state.reports.get(node)
    return report is not None and report.stopped and report.generation != state.number and not state.recorded


def _waits_for_attempt(turn: Turn) -> bool:
    """What the run goes on from is not known before its last attempt is committed or aborted."""
    barrier = turn.state.barrier
    if barrier is None or not rounds.undecided(turn):
        return False
    line = recovery_line(turn.state, _connected(turn.state))
    return line is None or line.step < barrier.attempt.step


def _judge(turn: Turn) -> None:
    """The generation is over and what it leaves is known: what now?"""
    state = turn.state
    if _waits_for_attempt(turn):
        rounds.feed(turn, commit.Expired("the run could not wait for it any longer"))
        if rounds.undecided(turn):
            return  # its record is being written: only storage can tell
        state = turn.state
    if state.drain is not None and not leaving.goes_on_first(state):
        leaving.drained(turn)
        return
    failure = _explain(state)
    turn.set(waiting_since=turn.now)
    if failure is None or state.judged:
        turn.enter(Phase.FORMING)
        return
    turn.set(judged=True)
    if failure.kind is FailureClass.CORRUPT and state.line is not None and state.line.attempt is not None:
        turn.set(spoiled=state.spoiled | {state.line.attempt})
        turn.log(f"the snapshot of step {state.line.step} is damaged and is passed over", "error")
    elif failure.kind is FailureClass.CORRUPT and state.resume is not None:
        turn.set(suspects=state.suspects | {state.resume.attempt})
        turn.log(f"the commit of step {state.resume.attempt.step} is damaged and is passed over", "error")
    ran = turn.now - state.started_at if not any(report.looping for report in map(state.report, state.members)) else 0.0
    line = recovery_line(state, _connected(state))
    came_to = line.step if line is not None else 0
    progressed = (
        state.newest_commit > state.judged_commit
        or came_to > state.judged_step > 0
        or ran >= state.policy.restart.progress_seconds
    )
    budget, verdict = supervision.judge(state.policy.restart, state.budget, failure, progressed)
    turn.set(budget=budget, judged_commit=state.newest_commit, judged_step=came_to, failure=failure)
    match verdict:
        case supervision.GiveUp(why):
            text = f"giving up: {why}. First failure: {failure.summary}"
            code = ExitCode.USAGE if failure.kind is FailureClass.USAGE else ExitCode.FAILED
            leaving.close(turn, code, f"{text}\n{failure.traceback}".rstrip())
        case supervision.Restart(delay):
            turn.do(Interrupted(failure, state.number, _furthest(state)))
            turn.enter(Phase.PAUSING, turn.now + delay)


def _furthest(state: State) -> int:
    return max([state.furthest, *(exit.step for _, exit in state.exits.values())])


def _explain(state: State) -> Failure | None:
    """The first cause. A lost node explains ranks elsewhere that only lost their peer."""
    failed = tuple(item for item in state.exits.values() if item[1].failed)
    if not failed:
        return state.failure
    first = supervision.first_failure(failed)
    rank_exit = next(exit for _, exit in failed if exit.rank == first.rank)
    unreachable = [name for name in state.members if name not in state.nodes or not state.nodes[name].connected]
    if unreachable and supervision.is_echo(rank_exit):
        if state.failure is not None and state.failure.kind is FailureClass.NODE:
            return state.failure
        members = state.generation.members if state.generation else ()
        lost = ", ".join(str(member.group_rank) for member in members if member.node in unreachable)
        return Failure(FailureClass.NODE, unreachable[0], f"node {lost} was lost: its agent's channel closed")
    return first


__all__ = ["Log", "initial", "step", "wake_at"]
