"""How a generation begins: formed of nodes, recorded in the journal, given a store, started."""

from __future__ import annotations

from dataclasses import replace

from ftrain.core import ending, journal, leaving, membership, metrics, reception, recovery, remains, schedule
from ftrain.core import messages as m
from ftrain.core.membership import Generation, Node
from ftrain.core.run_state import Continues, Phase, State, Turn
from ftrain.errors import ExitCode


def form(turn: Turn) -> None:
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
            survivors = remains.survivors(state, found.nodes)
            line = remains.recovery_line(state, found.nodes)
            assert state.generation is not None or not survivors
            if ending.awaited(state, found.nodes):
                return  # whoever could have gone on without it is gone, too; its deadline bounds the wait
            if survivors and (
                state.afresh
                or line is None
                or state.generation is None
                or not membership.same_places(state.generation, found)
            ):
                ending.stop(turn, "nothing of it can go on in place")
            else:
                _begin(turn, found, line, survivors)


def can_grow(turn: Turn) -> Node | None:
    """A node that waits, where the run goes on with fewer than it was meant for, and can end where it may begin."""
    state = turn.state
    policy = state.policy.formation
    if len(state.members) >= policy.nodes_max or not state.looping_since or state.drain is not None:
        return None
    if state.policy.checkpoint.off or any(state.report(name).at_end for name in state.members):
        return None
    ranks = {state.nodes[name].hello.node_rank for name in state.members if name in state.nodes} - {-1}
    for name, node in state.nodes.items():
        settled = turn.now >= node.joined_at + policy.last_call_seconds  # others may come with it
        if name not in state.members and node.connected and settled and node.hello.node_rank not in ranks:
            return node
    return None


def _busy(state: State, node: str) -> int:
    report = state.reports.get(node)
    idle = report is None or report.stopped or (report.halted and not state.scrapped)
    return 0 if idle or report is None else report.generation


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
        fetches=remains.fetches(state, generation, line, survivors),
        reports={name: report for name, report in state.reports.items() if name in state.nodes},
        exits={},
        gone=frozenset(),
        failure=None,
        judged=False,
        scrapped=False,
        afresh=False,
        looping_since=0.0,
        copying=None,  # other keepers may have to have it, from other nodes
    )
    metrics.go_back(turn, line.step if line is not None else resume.attempt.step if resume is not None else 0, resume)
    if line is None:
        due, snapshot_due = turn.now + policy.every_seconds, turn.now + policy.snapshot_seconds
        turn.set(attempts=0, cadence=schedule.Cadence(due, snapshot_due), held=None)
    else:
        # What a lost node had sealed is gone, but for what the run goes on from.
        held = line.attempt if line.tier is m.Tier.ARENA else None if state.gone else state.held
        turn.set(cadence=schedule.after_return(state.cadence, line.step), held=held)
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
    turn.do(Continues(generation.number, step, remains.furthest(turn.state), tier, kept, forked))


def starting(turn: Turn) -> None:
    state = turn.state
    if state.drain is not None and (state.line is None or state.gone):
        leaving.drained(turn)
    elif state.gone:
        if state.line is not None:
            ending.end(turn, "a node was lost before it began")
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
