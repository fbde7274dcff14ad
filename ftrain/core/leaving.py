"""How a run ends on purpose: a notice of preemption, Ctrl-C, the last step done, or nothing left to try."""

from __future__ import annotations

from dataclasses import replace

from ftrain.core import commit, journal, recovery, rounds
from ftrain.core import messages as m
from ftrain.core.run_state import Drain, Phase, State, Turn
from ftrain.errors import ExitCode

CLOSE_SECONDS = 10.0
REGROUP = "REGROUP"
REGROUP_SECONDS = 60.0  # to commit a step for it; a run that cannot goes on as it is
RECOVERING = (Phase.HALTING, Phase.SETTLING, Phase.PAUSING, Phase.FORMING, Phase.STARTING)


def notice(turn: Turn, node: str, why: str, grace_seconds: float) -> None:
    """A node must leave. The last finished step is committed first, if there is any way to."""
    state = turn.state
    if state.phase in (Phase.CLOSING, Phase.LEAVING):
        return
    drain = state.drain
    if drain is None:
        turn.log(f"{why}: saving the last finished step, then leaving")
        # What failed before may be no hindrance any more, and there is no time to wait for that.
        turn.set(cadence=replace(state.cadence, due=turn.now, retry_at=0.0, commit_at=0.0))
        drain = Drain(why, frozenset({node}), turn.now + grace_seconds)
    else:
        drain = replace(drain, nodes=drain.nodes | {node}, deadline=min(drain.deadline, turn.now + grace_seconds))
        if why == "SIGINT" or drain.why == REGROUP:
            drain = replace(drain, why=why)
    turn.set(drain=drain)
    rounds.take_back(turn)
    if state.phase is Phase.OPENING and why != "SIGINT" and not drain.nodes >= set(state.nodes):
        return  # the others go on, but nothing is decided about them before the history is ours
    if state.phase in (Phase.OPENING, Phase.ADOPTING, Phase.FORMING, Phase.PAUSING) and not goes_on_first(state):
        drained(turn)
    elif state.phase is Phase.RUNNING and not _worth_waiting(turn):
        _stop_all(turn)


def regroup(turn: Turn, why: str) -> None:
    """Commit the next step, end all workers there, and begin a generation with all nodes that are there by then."""
    turn.log(f"{why}: going on with it after the next commit")
    turn.set(drain=Drain(REGROUP, frozenset(), turn.now + REGROUP_SECONDS))
    turn.set(cadence=replace(turn.state.cadence, due=turn.now))
    rounds.take_back(turn)


def goes_on_first(state: State) -> bool:
    """Ranks stand still that can go on in place with what is there: the way to a last commit is short."""
    halted = any(report.halted for report in map(state.report, state.members))
    return halted and not (state.gone or state.scrapped) and state.phase is not Phase.ADOPTING


def _worth_waiting(turn: Turn) -> bool:
    """A last snapshot can be had: every rank is in its loop or will soon be again, and checkpoints are on."""
    recovering = turn.state.line is not None and not turn.state.looping_since
    return (rounds.can_snapshot(turn) or recovering) and not turn.state.policy.checkpoint.off


def _stop_all(turn: Turn) -> None:
    state = turn.state
    generation = state.generation
    assert generation is not None
    turn.set(scrapped=True)
    turn.enter(Phase.STOPPING, turn.now + state.policy.stop_grace_seconds + state.policy.lease_seconds)
    turn.to_members(m.Stop(state.term, generation.number, "the run is leaving", state.policy.stop_grace_seconds))
    rounds.feed_all(turn, commit.WorkersLost(generation.ranks, "the run is leaving"))


def expire(turn: Turn) -> None:
    """The grace of a notice, and the time for goodbyes."""
    state = turn.state
    waits = state.phase is Phase.RUNNING or (state.phase in RECOVERING and (state.line or goes_on_first(state)))
    if state.drain is not None and turn.now >= state.drain.deadline and state.drain.why == REGROUP:
        if state.drain.decided and state.phase is Phase.RUNNING:
            turn.set(drain=replace(state.drain, deadline=float("inf")))
            _stop_all(turn)  # somebody has not heard that it is to end
        elif not state.drain.decided:
            turn.log("no step could be committed to go on with more nodes; going on as it is", "warning")
            turn.set(drain=None)
    elif state.drain is not None and turn.now >= state.drain.deadline and waits:
        turn.log("out of time: leaving without a commit of the last step", "warning")
        turn.set(drain=replace(state.drain, deadline=float("inf")))
        _stop_all(turn)
    if state.phase is Phase.CLOSING and turn.now >= state.until:
        let_go(turn)


def drained(turn: Turn) -> None:
    """Nothing of the leaving nodes runs any more, and the last attempt is settled."""
    state = turn.state
    drain = state.drain
    assert drain is not None
    if drain.why == REGROUP:
        turn.set(drain=None, waiting_since=turn.now, exits={})
        turn.enter(Phase.FORMING)
        return
    nothing_ran = state.phase in (Phase.OPENING, Phase.ADOPTING, Phase.FORMING, Phase.STARTING, Phase.PAUSING)
    saved = (drain.saved or nothing_ran or _accounted_for(state)) and _nothing_lost(state, drain)
    text = recovery.standing(state.history, state.suspects)
    if saved:
        text = "the last finished step is committed" if _committed(state) else "no step was finished"
    if drain.why == "SIGINT":
        close(turn, ExitCode.INTERRUPTED, f"interrupted; {text}")
        return
    code = ExitCode.PREEMPTED if saved else ExitCode.PREEMPTED_UNSAVED
    text = f"left on SIGTERM; {text}"
    if drain.nodes >= set(state.nodes):
        turn.set(exit_code=int(code), summary=text)
        let_go(turn)
        return
    for node in sorted(drain.nodes):
        turn.send(node, m.Leave(state.term, int(code), text))
    turn.set(drain=None, waiting_since=turn.now, exits={})
    turn.set(nodes={name: node for name, node in state.nodes.items() if name not in drain.nodes})
    turn.enter(Phase.FORMING)


def _accounted_for(state: State) -> bool:
    """Of each rank of the generation it is known how far it came, for it has ended."""
    generation = state.generation
    return generation is not None and all(
        len(state.report(member.node).exits) == member.processes for member in generation.members
    )


def _nothing_lost(state: State, drain: Drain) -> bool:
    """No rank, as far as the newest reports go, has done or will do anything that is not committed."""
    committed = _committed(state)
    # A run that has committed before is of a script that joins, even if it has not come to that yet.
    joins = bool(state.history.commits) or any(node.hello.joins for node in state.nodes.values())
    reports = [state.reports[name] for name in {*state.nodes, *state.members} if name in state.reports]
    if not drain.saved and any(rank.step >= 0 for report in reports for rank in report.ranks):
        return False  # it is in its loop, and may finish a step before it is ended
    places = [(rank.step, rank.phase) for report in reports for rank in report.ranks]
    places += [(exit.step, exit.phase) for report in reports for exit in report.exits]
    return not any(recovery.unsaved(step, phase, committed, joins) for step, phase in places)


def _committed(state: State) -> int:
    """The step of the commit that the run would go on from, 0 for none."""
    line = recovery.recovery_line(state.history, state.suspects)
    return line.attempt.step if line is not None else 0


def finished(turn: Turn) -> None:
    """All ranks ended well: the end of the run. A good one only if its last state is committed."""
    state = turn.state
    if lost := rounds.lost(state):
        close(turn, ExitCode.STORAGE, lost)
        return
    done = max(exit.step for _, exit in state.exits.values())
    close(turn, ExitCode.OK, f"finished{f' after step {done}' if done >= 0 else ''}")


def close(turn: Turn, code: int, summary: str) -> None:
    """The run itself ends: that belongs into its history, then everybody may go."""
    state = turn.state
    turn.set(exit_code=int(code), summary=summary)
    turn.enter(Phase.CLOSING, turn.now + CLOSE_SECONDS)
    step = state.history.commits[-1][1].attempt.step if state.history.commits else -1
    if state.term:
        turn.append(journal.FinishBody(int(code), step, summary))
    else:
        let_go(turn)


def let_go(turn: Turn) -> None:
    state = turn.state
    turn.enter(Phase.LEAVING, turn.now + state.policy.goodbye_seconds)
    for node in state.nodes:
        turn.send(node, m.Leave(state.term, state.exit_code, state.summary))
    leaving(turn)


def leaving(turn: Turn) -> None:
    """Over when the last node has said goodbye, or has had the time to."""
    state = turn.state
    if not any(node.connected for node in state.nodes.values()) or turn.now >= state.until:
        turn.over(state.exit_code, state.summary)
