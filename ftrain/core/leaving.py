"""How a run ends on purpose: a notice of preemption, Ctrl-C, the last step done, or nothing left to try."""

from __future__ import annotations

from dataclasses import replace

from ftrain.core import commit, journal, rounds
from ftrain.core import messages as m
from ftrain.core.run_state import Drain, Phase, State, Turn
from ftrain.errors import ExitCode

CLOSE_SECONDS = 10.0


def notice(turn: Turn, node: str, why: str, grace_seconds: float) -> None:
    """A node must leave. The last finished step is committed first, if there is any way to."""
    state = turn.state
    if state.phase in (Phase.CLOSING, Phase.LEAVING):
        return
    drain = state.drain
    if drain is None:
        turn.log(f"{why}: saving the last finished step, then leaving")
        turn.set(cadence=replace(state.cadence, due=turn.now))
        drain = Drain(why, frozenset({node}), turn.now + grace_seconds)
    else:
        drain = replace(drain, nodes=drain.nodes | {node}, deadline=min(drain.deadline, turn.now + grace_seconds))
        if why == "SIGINT":
            drain = replace(drain, why=why)
    turn.set(drain=drain)
    barrier = state.barrier
    if barrier is not None and not barrier.hold and barrier.stage in (commit.Stage.PROPOSED, commit.Stage.ARMED):
        rounds.feed(turn, commit.Expired("the run is leaving: its last step is saved instead"))
        turn.set(cadence=replace(turn.state.cadence, retry_at=turn.now))  # that was no failure to rest from
    if state.phase is Phase.OPENING and why != "SIGINT" and not drain.nodes >= set(state.nodes):
        return  # the others go on, but nothing is decided about them before the history is ours
    if state.phase in (Phase.OPENING, Phase.ADOPTING, Phase.FORMING, Phase.PAUSING):
        drained(turn)
    elif state.phase is Phase.RUNNING and not _worth_waiting(turn):
        _stop_all(turn)


def _worth_waiting(turn: Turn) -> bool:
    """A last snapshot can be had: every rank is in its loop, and checkpoints are on."""
    return rounds.can_snapshot(turn) and not turn.state.policy.checkpoint.off


def _stop_all(turn: Turn) -> None:
    state = turn.state
    ranks = [rank for node in state.members for rank in state.report(node).ranks]
    # A run that has committed before is of a script that joins, even if it has not come to that yet.
    joined = bool(state.history.commits) or (bool(ranks) and all(rank.joined for rank in ranks))
    if joined and state.drain is not None and not any(state.report(node).looping for node in state.members):
        # Between its restore and its first step a run holds nothing that is not committed already.
        turn.set(drain=replace(state.drain, saved=True))
    generation = state.generation
    assert generation is not None
    turn.enter(Phase.STOPPING, turn.now + state.policy.stop_grace_seconds + state.policy.lease_seconds)
    turn.to_members(m.Stop(state.term, generation.number, "the run is leaving", state.policy.stop_grace_seconds))
    rounds.feed(turn, commit.WorkersLost(generation.ranks, "the run is leaving"))


def expire(turn: Turn) -> None:
    """The grace of a notice, and the time for goodbyes."""
    state = turn.state
    if state.drain is not None and turn.now >= state.drain.deadline and state.phase is Phase.RUNNING:
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
    nothing_ran = state.phase in (Phase.OPENING, Phase.ADOPTING, Phase.FORMING, Phase.STARTING, Phase.PAUSING)
    saved = (drain.saved or nothing_ran) and _nothing_lost(state)
    if drain.why == "SIGINT":
        text = "interrupted; the last finished step is committed" if saved else "interrupted; the last commit stands"
        close(turn, ExitCode.INTERRUPTED, text)
        return
    code = ExitCode.PREEMPTED if saved else ExitCode.PREEMPTED_UNSAVED
    text = f"left on SIGTERM; the last {'finished step is committed' if saved else 'commit stands'}"
    if drain.nodes >= set(state.nodes):
        turn.set(exit_code=int(code), summary=text)
        let_go(turn)
        return
    for node in sorted(drain.nodes):
        turn.send(node, m.Leave(state.term, int(code), text))
    turn.set(drain=None, waiting_since=turn.now, exits={})
    turn.set(nodes={name: node for name, node in state.nodes.items() if name not in drain.nodes})
    turn.enter(Phase.FORMING)


def _nothing_lost(state: State) -> bool:
    """No rank, as far as its node's newest report goes, has finished a step that is not committed."""
    reports = [state.reports[name] for name in state.nodes if name in state.reports]
    steps = [rank.step for report in reports for rank in report.ranks]
    steps += [exit.step for report in reports for exit in report.exits]
    committed = state.history.commits[-1][1].attempt.step if state.history.commits else 0
    return max(steps, default=-1) <= committed


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
