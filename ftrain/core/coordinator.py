"""Everything that the coordinator decides, as one pure state machine.

`step(state, event, now)` takes what happened and returns the new state and what to do about it. The service around it
owns sockets, storage and the clock; the simulator is another such service. What deserves a page of its own is next
door: who is here (`membership`), how a generation begins and ends (`forming`, `ending`), what is left of one
(`remains`), what a failure means (`supervision`), checkpoint attempts (`rounds`, `commit`, `schedule`), the one history
(`journal`), what to start from (`recovery`).

Rules that hold throughout: nothing is decided before this coordinator's `run` record is in the journal (its sequence
number is the coordinator's *term*); a generation is in the journal before any of its workers starts; and once the
journal says that somebody else continued the history, this coordinator sends nothing more.
"""

from __future__ import annotations

import msgspec

from ftrain.core import (
    commit,
    ending,
    forming,
    hangs,
    journal,
    leaving,
    metrics,
    reception,
    recovery,
    remains,
    rounds,
    supervision,
)
from ftrain.core import messages as m
from ftrain.core.journal import History
from ftrain.core.membership import Generation, Member
from ftrain.core.run_state import (
    Action,
    Begin,
    Discard,
    Disconnected,
    Event,
    Log,
    Phase,
    Published,
    Received,
    Resumed,
    RunPolicy,
    State,
    Stored,
    Sweep,
    Tick,
    Turn,
)
from ftrain.core.schedule import Cadence
from ftrain.core.supervision import Failure, FailureClass
from ftrain.errors import ExitCode

LOOK_SECONDS = 0.0001  # for each node, from one look to the next that can wait: a thousand take 10 ms to look at
ATTEMPTS_PER_TERM = 1_000_000  # an adopted generation's attempts are numbered from its coordinator's term times this


def initial(policy: RunPolicy, history: History, writer: str) -> State:
    """A coordinator that has read the journal and decided nothing yet. `writer` is unique for this life of it."""
    number = history.generation.generation if history.generation else 0
    state = State(policy, history, journal.Appender(writer, history.head), number=number)
    return msgspec.structs.replace(state, judged_commit=state.newest_commit, logged=metrics.of_newest(history))


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
    looks_at = state.looked_at + LOOK_SECONDS * len(state.nodes)
    if now < looks_at and _can_wait(state, event, turn.state):
        turn.set(looks_at=looks_at)
    else:
        turn.set(looked_at=now, looks_at=float("inf"))
        _expire(turn)
        _doubt(turn)
        _advance(turn)
    return turn.state, tuple(turn.actions)


def _can_wait(before: State, event: Event, after: State) -> bool:
    """Of most of what nodes say nothing follows by itself: one look then serves for all that they say meanwhile."""
    if not isinstance(event, Received):
        return False
    match event.message:
        case m.Heartbeat() | m.Metrics():
            return True
        case m.Changed(report):
            known = before.reports.get(event.node)
            return known is not None and _is_at(known) == _is_at(report)  # what it holds or keeps is something else
        case m.ArmReply() | m.Sealed() | m.Prepared():
            stages = [[barrier.stage for barrier in state.attempts_under_way] for state in (before, after)]
            return stages[0] == stages[1]
    return False


def _is_at(report: m.Report) -> tuple[object, ...]:
    """Where a node's part of the generation has come to."""
    halted = [rank.rank for rank in report.ranks if rank.halted]
    return report.generation, report.stopped, report.exits, report.looping, report.at_end, report.halted, halted


def wake_at(state: State, now: float) -> float:
    """When a `Tick` is due next. What was due by `now` has been done by the step that ended then."""
    if state.looks_at < float("inf"):
        return state.looks_at  # so soon that all else has time until then
    times = [state.until, state.appender.retry_at if state.appender.stage is journal.Stage.WAITING else float("inf")]
    times += [node.lease_until for node in state.nodes.values()]
    times += ending.looks_again_at(state)
    if state.phase is Phase.FORMING:
        times.append(state.probe_at)
    times += [barrier.deadline for barrier in state.attempts_under_way]
    if state.barrier is None and state.phase is Phase.RUNNING:
        times += [state.cadence.due, state.cadence.retry_at, state.cadence.commit_at]
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
            barrier = turn.state.writing
            assert barrier is not None and barrier.attempt == attempt, "only the attempt under way is ever recorded"
            rounds.feed(turn, attempt, commit.Recorded())
        case journal.RetireBody():
            for attempt in turn.state.history.let_go:
                turn.do(Discard(attempt))
        case journal.FinishBody():
            leaving.let_go(turn)


def _take_over(turn: Turn) -> None:
    """The history is ours. Is its last generation still running somewhere?"""
    state = turn.state
    last = state.history.generation
    turn.set(waiting_since=turn.now)
    if last is not None:
        turn.do(Sweep(frozenset(state.history.needed), last.generation))
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
    barrier = turn.state.writing
    if barrier is None or barrier.attempt != attempt or barrier.stage is not commit.Stage.PREPARED:
        return
    rounds.feed(turn, attempt, commit.Published(manifest_sha256) if manifest_sha256 else commit.PublishFailed(cause))


def _expire(turn: Turn) -> None:
    """Leases and deadlines that have run out by now."""
    lease = turn.state.policy.lease_seconds
    expired = [name for name, node in turn.state.nodes.items() if turn.now >= node.lease_until]
    if expired and turn.state.phase is Phase.RUNNING and reception.is_deaf(turn.state, turn.now):
        if len(expired) == len(turn.state.nodes):
            _cut_off(turn)
        expired = []  # who is cut off is not known before the last lease has run out, or somebody is heard
    for name in expired:
        where = reception.place(turn, name)
        reception.lose(turn, name, f"node {where} was silent for {lease:g} s: its lease ran out")
    rounds.expire(turn)
    for record in turn.record(journal.Retry()):
        _recorded(turn, record)
    leaving.expire(turn)


def _cut_off(turn: Turn) -> None:
    """All leases ran out, and nobody else is heard: the nodes may well be at work, and this coordinator be cut off.

    It is as if it had died and come back: whatever is heard next says how the generation has fared meanwhile.
    """
    state = turn.state
    generation = state.generation
    assert generation is not None
    turn.log(
        "no node is heard any more: this coordinator is cut off, or all nodes are gone; waiting for them", "warning"
    )
    rounds.feed_all(turn, commit.ArenasLost(generation.ranks, "no node was heard any more"))
    turn.set(nodes={}, waiting_since=turn.now)
    turn.enter(Phase.ADOPTING, turn.now + state.policy.formation.wait_seconds)


# --------------------------------------------------------------------------------------------------------- generations


def _doubt(turn: Turn) -> None:
    """A node that has obeyed a later coordinator, or is in a later generation: is it another's run by the journal?

    Whoever commits nothing writes nothing, and would never notice.
    """
    state = turn.state
    nodes = [node for node in state.nodes.values() if node.connected]
    reports = [state.reports[node.name] for node in nodes if node.name in state.reports]
    later = any(node.hello.term_seen > state.term for node in nodes)
    later = later or any(report.generation > state.number for report in reports)
    if state.term and later and turn.now >= state.probe_at:
        turn.set(probe_at=turn.now + state.policy.lease_seconds)
        turn.record(journal.Probe())


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
                forming.form(turn)
            case Phase.STARTING:
                forming.starting(turn)
            case Phase.RUNNING:
                _running(turn)
            case Phase.HALTING:
                ending.halting(turn)
            case Phase.STOPPING:
                ending.stopping(turn)
            case Phase.SETTLING:
                ending.settling(turn)
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
        attempts = max(state.attempts, state.term * ATTEMPTS_PER_TERM, *(report.attempt_seen for report in reports))
        held = max(remains.held_by_all(state, remains.connected_nodes(state)), default=None)
        turn.set(attempts=attempts, resume=resume, cadence=Cadence(due=turn.now), held=held)
        turn.log(f"generation {generation.number} is still running on all nodes: carrying on with it")
        turn.enter(Phase.RUNNING)
        for node in state.members:
            reception.resync(turn, node, state.report(node))
    elif turn.now >= state.until or all(
        # What is left on the other nodes may go on in place, and one of them may keep what the lost one had.
        name in state.gone or (name in state.nodes and remains.knows(state, name))
        for name in state.members
    ):
        turn.set(gone=state.gone | (generation.nodes - set(state.nodes)))
        if turn.state.gone and any(report.ranks or report.exits for report in reports):
            lost = ", ".join(str(member.group_rank) for member in generation.members if member.node in turn.state.gone)
            why = f"node {lost} was lost with the coordinator"
            turn.set(failure=Failure(FailureClass.NODE, lost, why))
        turn.set(failed_at=turn.now)
        turn.set(attempts=max(state.attempts, state.term * ATTEMPTS_PER_TERM))
        ending.end(turn, "not all of it is alive")


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
    halted = [node for node in state.members if remains.knows(state, node) and remains.is_over(state.report(node))]
    cut = [(node, rank) for node in state.members for rank in state.report(node).ranks if rank.halted]
    if failed or state.gone or halted or cut:
        if state.failure is None and failed:
            turn.set(failure=supervision.explain(state.exits[failed[0].rank][0], failed[0]))
        elif state.failure is None and halted:
            where, alive = reception.place(turn, halted[0]), state.report(halted[0]).halted
            why = f"node {where} was {'cut off' if alive else 'stopped by a former coordinator'}"
            turn.set(failure=Failure(FailureClass.LINK if alive else FailureClass.NODE, halted[0], why))
        elif state.failure is None and cut:
            node, rank = cut[0]
            why = f"rank {rank.rank} lost its peers after step {rank.step}"
            turn.set(failure=Failure(FailureClass.LINK, node, why, rank.rank, rank.step))
        turn.set(failed_at=turn.now)
        if turn.state.failure is not None and turn.state.failure.kind is FailureClass.HANG:
            _count_hang(turn)
        assert turn.state.failure is not None or state.drain is not None
        ending.end(turn, turn.state.failure.summary if turn.state.failure else "the run is leaving")
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
            rounds.retire(turn)  # not before: what it goes on from has been read, and was not found damaged
        if newcomer := forming.can_grow(turn):
            leaving.regroup(turn, f"a node on {newcomer.hello.host} joined")
        rounds.copy(turn)
        rounds.propose(turn)
        in_place = turn.state.looping_since or turn.state.line is not None
        if in_place and turn.state.drain is None and turn.now >= turn.state.hangs_due:
            _look_for_hangs(turn)


def _look_for_hangs(turn: Turn) -> None:
    """Once in a while: a rank that others wait for is killed; where nobody can be named, all go on in place."""
    state = turn.state
    turn.set(hangs_due=turn.now + state.policy.heartbeat_seconds)
    nodes = {rank.rank: node for node in state.members for rank in state.report(node).ranks}
    ranks = [rank for node in state.members for rank in state.report(node).ranks]
    if state.generation is None or len(ranks) < state.generation.world_size:
        return
    absent = ending.unreached(state, turn.now)
    if absent and hangs.are_deserted([rank for rank in ranks if nodes[rank.rank] not in absent]):
        failure = ending.channel_closed(state, absent)
        turn.set(failure=failure, failed_at=turn.now)
        ending.end(turn, failure.summary)
        return
    factor = hangs.leniency(state.hangs) if state.furthest <= state.hung_step else 1.0
    match hangs.judge(ranks, factor) if state.looping_since else hangs.judge_arrival(ranks, factor):
        case hangs.Kill(rank, step, collective, hang):
            turn.send(nodes[rank], m.KillRank(state.term, state.number, rank, step, collective, hang))
        case hangs.Cut(why, rank, step):
            kind = FailureClass.LINK if rank < 0 else FailureClass.HANG
            turn.set(failure=Failure(kind, nodes.get(rank, ""), why, rank, step), failed_at=turn.now)
            _count_hang(turn)
            ending.end(turn, why)


def _count_hang(turn: Turn) -> None:
    state = turn.state
    again = state.furthest <= state.hung_step
    turn.set(hangs=state.hangs + 1 if again else 1, hung_step=state.furthest)


__all__ = ["Log", "initial", "step", "wake_at"]
