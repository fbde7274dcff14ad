"""How a generation ends: its workers stand still or stop, what they leave settles, and the failure is judged.

    RUNNING ──► HALTING ──► SETTLING ──► (judged) ──► PAUSING ──► FORMING
       └──────► STOPPING ──────┘                        └► CLOSING: given up

Workers stand still where some of them may go on in place. They stop where none can, on the way out of the run, and
where standing still does not come to an end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from ftrain.core import commit, leaving, reception, remains, rounds, supervision
from ftrain.core import messages as m
from ftrain.core.commit import Barrier
from ftrain.core.membership import Generation, Node
from ftrain.core.run_state import Interrupted, Phase, State, Turn
from ftrain.core.supervision import Failure, FailureClass
from ftrain.errors import ExitCode

STUMBLES_MAX = 3  # recoveries in place that failed in a row, before all ranks are forked anew
RECONNECT_SECONDS = 2.0  # how long an ending generation waits for the report of a node whose channel broke


def end(turn: Turn, why: str) -> None:
    """End the present generation: its workers stand still where something may go on in place, otherwise they go."""
    if turn.state.drain is not None and turn.state.drain.why == leaving.REGROUP and not turn.state.drain.decided:
        turn.set(drain=None)  # the next generation takes whoever is there anyway
    state = turn.state
    generation = state.generation
    assert generation is not None
    ended = any(exit.ok for _, exit in state.exits.values())
    stumbles = state.stumbles + (state.line is not None and not state.looping_since)
    turn.set(stumbles=stumbles)
    if state.drain is not None or not _survives(state, generation) or ended or stumbles > STUMBLES_MAX:
        stop(turn, why)
        return
    turn.enter(Phase.HALTING, turn.now + state.policy.halt_seconds + state.policy.lease_seconds)
    for node in state.members:
        reception.halt_node(turn, node, generation.number, why)
    _workers_lost(turn, generation, why)


def _survives(state: State, generation: Generation) -> bool:
    """Whether any rank can stand still and go on: what a node says of it, or did say before this generation began."""
    for member in generation.members:
        if remains.knows(state, member.node):
            if any(rank.looped for rank in state.report(member.node).ranks):
                return True
        elif state.survivors.intersection(member.ranks):
            return True
    return False


def stop(turn: Turn, why: str) -> None:
    """End the present generation: all of its workers go, what they sealed may still be committed."""
    state = turn.state
    generation = state.generation
    assert generation is not None
    turn.set(scrapped=True)
    turn.enter(Phase.STOPPING, turn.now + state.policy.stop_grace_seconds + state.policy.lease_seconds)
    for node in state.members:
        reception.stop_node(turn, node, generation.number, why)
    _workers_lost(turn, generation, why)


def _workers_lost(turn: Turn, generation: Generation, why: str) -> None:
    """What is under way learns that no rank will seal it any more, but for what is sealed by then."""
    rounds.feed_all(turn, commit.WorkersLost(generation.ranks, why))
    rounds.feed_all(turn, commit.ArenasLost(_ranks(generation, turn.state.gone), why))


def _ranks(generation: Generation, nodes: frozenset[str]) -> frozenset[int]:
    return frozenset(rank for member in generation.members if member.node in nodes for rank in member.ranks)


def halting(turn: Turn) -> None:
    """Wait until everything of the generation stands still or is gone."""
    missing = _missing(turn, remains.is_over)
    if missing and turn.now >= turn.state.until:
        stop(turn, "not all of it came to a halt")
    elif not missing:
        turn.enter(Phase.SETTLING, turn.now + turn.state.policy.settle_seconds)


def stopping(turn: Turn) -> None:
    """Wait until every member that can still answer has said that nothing of the generation runs there."""
    missing = _missing(turn, lambda report: report.stopped)
    if not missing or turn.now >= turn.state.until:
        turn.enter(Phase.SETTLING, turn.now + turn.state.policy.settle_seconds)


def _missing(turn: Turn, is_done: Callable[[m.Report], bool]) -> list[Node]:
    """The members of the generation that can still answer, and have not said that they are done with it."""
    state = turn.state
    generation = state.generation
    assert generation is not None
    missing, absent = [], unreached(state, turn.now)
    for name in state.members:
        node = state.nodes.get(name)
        if node is None or (remains.knows(state, name) and is_done(state.report(name))):
            continue
        if _never_started(state, name):
            continue
        if name in absent:
            continue  # its workers may live on, but they are fenced: nothing of theirs can be committed
        missing.append(node)
    return missing


def looks_again_at(state: State) -> list[float]:
    """When an ending generation gives up waiting for nodes whose channels broke. The others have their own time."""
    if state.phase not in (Phase.HALTING, Phase.STOPPING, Phase.SETTLING):
        return []
    members = (state.nodes.get(name) for name in state.members)
    return [_back_by(state, node) for node in members if node is not None and not node.connected]


def unreached(state: State, now: float) -> frozenset[str]:
    """The members whose channel broke, and who did not come back in time."""
    nodes = [(name, state.nodes.get(name)) for name in state.members]
    return frozenset(name for name, node in nodes if node and not node.connected and now >= _back_by(state, node))


def _back_by(state: State, node: Node) -> float:
    """When a node whose channel broke is not waited for any longer."""
    lease = state.policy.lease_seconds
    return node.lease_until - lease + min(RECONNECT_SECONDS, lease)


def _never_started(state: State, node: str) -> bool:
    """The node has reported since, and knows nothing of the present generation."""
    report = state.reports.get(node)
    return report is not None and report.stopped and report.generation != state.number and not state.recorded


def awaited(state: State, nodes: frozenset[str]) -> tuple[Barrier, ...]:
    """What these nodes go on from is not known before these attempts of the run are committed or aborted."""
    if not state.attempts_under_way:
        return ()
    line = remains.recovery_line(state, nodes)
    return tuple(one for one in state.attempts_under_way if line is None or line.step < one.attempt.step)


def settling(turn: Turn) -> None:
    """Wait for attempts that matter, as long as who they wait for can still be heard."""
    state = turn.state
    waits = [barrier for barrier in awaited(state, remains.connected_nodes(state)) if _can_end(turn, barrier)]
    if not waits or turn.now >= state.until:
        judge(turn)


def _can_end(turn: Turn, barrier: Barrier) -> bool:
    state = turn.state
    absent = unreached(state, turn.now)
    for member in state.generation.members if state.generation is not None else ():
        if barrier.missing.isdisjoint(member.ranks):
            continue
        node = state.nodes.get(member.node)
        if node is None or member.node in absent:
            return False
    return True


def judge(turn: Turn) -> None:
    """The generation is over and what it leaves is known: what now?"""
    state = turn.state
    for barrier in awaited(state, remains.connected_nodes(state)):
        rounds.feed(turn, barrier.attempt, commit.Expired("the run could not wait for it any longer"))
    state = turn.state
    if awaited(state, remains.connected_nodes(state)):
        return  # its record is being written: only storage can tell
    if state.drain is not None and not leaving.goes_on_first(state):
        leaving.drained(turn)
        return
    failure = _explain(state)
    turn.set(waiting_since=turn.now)
    if failure is None or state.judged:
        turn.enter(Phase.FORMING)
        return
    turn.set(judged=True)
    if failure.kind is FailureClass.CORRUPT and state.resume is None and (state.line is None or not state.line.attempt):
        failure = replace(failure, kind=FailureClass.EXCEPTION)  # there is nothing to be passed over
    if failure.kind is FailureClass.CORRUPT and state.line is not None and state.line.attempt is not None:
        turn.set(spoiled=state.spoiled | {state.line.attempt})
        turn.log(f"the snapshot of step {state.line.step} is damaged and is passed over", "error")
    elif failure.kind is FailureClass.CORRUPT and state.resume is not None:
        turn.set(suspects=state.suspects | {state.resume.attempt})
        turn.log(f"the commit of step {state.resume.attempt.step} is damaged and is passed over", "error")
    ran = turn.now - state.started_at if not any(report.looping for report in map(state.report, state.members)) else 0.0
    line = remains.recovery_line(state, remains.connected_nodes(state))
    came_to = line.step if line is not None else 0
    passed = state.newest_commit > state.judged_commit or ran >= state.policy.restart.progress_seconds
    progressed = passed or came_to > state.judged_step > 0
    passed = passed or came_to > state.budget.step >= 0
    budget, verdict = supervision.judge(state.policy.restart, state.budget, failure, progressed, passed)
    turn.set(budget=budget, judged_commit=state.newest_commit, judged_step=came_to, failure=failure)
    match verdict:
        case supervision.GiveUp(why):
            text = f"giving up: {why}. First failure: {failure.summary}"
            code = ExitCode.USAGE if failure.kind is FailureClass.USAGE else ExitCode.FAILED
            leaving.close(turn, code, f"{text}\n{failure.traceback}".rstrip())
        case supervision.Restart(delay):
            turn.do(Interrupted(failure, state.number, remains.furthest(state)))
            # A rank that comes back is alone at first, and scripts may not be made for that: not twice in a row.
            came_alone = state.line is not None and not state.looping_since
            turn.set(afresh=came_alone and failure.is_of_the_script)
            turn.enter(Phase.PAUSING, turn.now + delay)


def _explain(state: State) -> Failure | None:
    """The first cause. A lost node explains ranks elsewhere that only lost their peer."""
    failed = tuple(item for item in state.exits.values() if item[1].failed)
    first = supervision.first_failure(failed) if failed else state.failure
    if failed and first is not None:
        is_echo = supervision.is_echo(next(exit for _, exit in failed if exit.rank == first.rank))
    else:
        is_echo = first is not None and first.kind is FailureClass.LINK
    unreachable = [name for name in state.members if name not in state.nodes or not state.nodes[name].connected]
    if unreachable and is_echo:
        if state.failure is not None and state.failure.kind is FailureClass.NODE:
            return state.failure
        return channel_closed(state, unreachable)
    return first


def channel_closed(state: State, names: Collection[str]) -> Failure:
    """These members of the generation, one at least, are gone, as far as anybody knows."""
    members = [member for member in (state.generation.members if state.generation else ()) if member.node in names]
    lost = ", ".join(str(member.group_rank) for member in members)
    return Failure(FailureClass.NODE, members[0].node, f"node {lost} was lost: its agent's channel closed")
