"""What nodes say to the coordinator: how they join, report, fall silent, are replaced; what they are told again."""

from __future__ import annotations

from dataclasses import replace

from ftrain.core import commit, copying, hangs, keeping, leaving, membership, metrics, rounds, supervision
from ftrain.core import messages as m
from ftrain.core.membership import Member, Node
from ftrain.core.run_state import Measured, Phase, State, Turn
from ftrain.core.supervision import Failure, FailureClass
from ftrain.errors import ExitCode

DEAF_HEARTBEATS = 2.5  # a node that has missed so many says nothing at the moment
IN_PLACE = (Phase.STARTING, Phase.RUNNING, Phase.HALTING)  # where halted workers of a generation before may be needed


def received(turn: Turn, name: str, message: m.FromAgent) -> None:
    if isinstance(message, m.Hello):
        _hello(turn, message)
        return
    node = turn.state.nodes.get(name)
    if node is None:
        return  # declined, replaced or lost: whatever it says comes too late
    lease = turn.state.policy.lease_seconds
    turn.set(nodes={**turn.state.nodes, name: membership.renewed(node, turn.now, lease)})
    match message:
        case m.Heartbeat(sequence, report):
            turn.send(name, m.Heard(turn.state.term, sequence))
            _report(turn, name, report)
        case m.Changed(report):
            _report(turn, name, report)
        case m.StoreReady(generation, address, port):
            if turn.state.phase is Phase.STARTING and generation == turn.state.number:
                turn.set(store=(address, port))
        case m.ArmReply() | m.Sealed() | m.Prepared() | m.AttemptFailed():
            rounds.message(turn, name, message)
        case m.Notice(why, grace_seconds):
            leaving.notice(turn, name, why, grace_seconds)
        case m.Metrics():
            metrics.heard(turn, message)
            turn.do(Measured(message))
        case m.Goodbye(why):
            lose(turn, name, f"node {place(turn, name)} left: {why}")


def _hello(turn: Turn, hello: m.Hello) -> None:
    state = turn.state
    refusal = _refusal(state, hello)
    if refusal is not None:
        node = Node(hello, turn.now, turn.now)
        turn.set(nodes={**state.nodes, hello.node: node})
        turn.send(hello.node, refusal)
        turn.set(nodes=state.nodes)
        turn.log(f"node on {hello.host} was not taken: {refusal.reason}", "warning")
        return
    predecessor = membership.replaces(hello, state.nodes.values())
    if predecessor is not None and not predecessor.connected:
        lose(turn, predecessor.name, f"node {hello.node_rank} was replaced by a new launcher on {hello.host}")
    known = turn.state.nodes.get(hello.node)
    joined_at = known.joined_at if known else turn.now
    node = Node(hello, joined_at, turn.now + state.policy.lease_seconds)
    turn.set(
        nodes={**turn.state.nodes, hello.node: node},
        reports={**turn.state.reports, hello.node: _newer(turn.state.reports.get(hello.node), hello.report)},
        job_sha256=state.job_sha256 or hello.job_sha256,
    )
    if state.phase is Phase.ADOPTING and state.generation is not None:
        for member in state.generation.members:
            if member.node_rank >= 0 and member.node_rank == hello.node_rank and member.node != hello.node:
                turn.set(gone=turn.state.gone | {member.node})
    if state.phase is Phase.ADOPTING and not state.nodes:  # the others have a lease's time to come, too
        turn.set(until=min(state.until, turn.now + state.policy.lease_seconds))
    if state.term:
        welcome(turn, hello.node)
        if predecessor is not None and predecessor.connected:
            # Two launchers by mistake, or a machine that vanished without a word: its lease will tell.
            holder = predecessor.hello
            text = f"node rank {hello.node_rank} is held by process {holder.pid} on {holder.host}; waiting for its end"
            turn.send(hello.node, m.Tell(text))


def _newer(known: m.Report | None, report: m.Report) -> m.Report:
    return report if known is None or report.version >= known.version else known


def _refusal(state: State, hello: m.Hello) -> m.Declined | None:
    policy = state.policy
    if hello.version != policy.version:
        return m.Declined(
            f"this node runs ftrain {hello.version}, the coordinator {policy.version}; install the same on all nodes",
            ExitCode.USAGE,
        )
    if hello.run_id != policy.run_id:
        return m.Declined(
            f"the coordinator here serves run {policy.run_id!r}, not {hello.run_id!r}; "
            "check --rdzv-id and --rdzv-endpoint",
            ExitCode.USAGE,
        )
    if state.job_sha256 and hello.job_sha256 != state.job_sha256:
        return m.Declined(
            "this node was given another script, other arguments or another topology than the first node; "
            "use the same command line",
            ExitCode.USAGE,
        )
    if state.phase in (Phase.CLOSING, Phase.LEAVING):
        return m.Declined(f"the run is over: {state.summary.partition(chr(10))[0]}", ExitCode.UNAVAILABLE)
    return None


def welcome(turn: Turn, node: str) -> None:
    policy = turn.state.policy
    turn.send(node, m.Welcome(policy.run_id, turn.state.term, policy.lease_seconds, policy.heartbeat_seconds))
    resync(turn, node, turn.state.reports[node])
    attempt = turn.state.copying
    if attempt is not None and node in turn.state.members:
        turn.send(node, m.Copy(turn.state.term, attempt))  # it may not have heard of it


def _report(turn: Turn, node: str, report: m.Report) -> None:
    known = turn.state.reports.get(node)
    if known is not None and report.version < known.version:
        return
    turn.set(reports={**turn.state.reports, node: report})
    if turn.state.term:
        resync(turn, node, report)


def resync(turn: Turn, node: str, report: m.Report) -> None:
    """Tell a node again what it must have missed, and take in what its report says of the present generation."""
    state = turn.state
    generation = state.generation
    member = generation.member(node) if generation is not None else None
    if generation is None or report.generation != generation.number:
        goes_on = report.halted and member is not None and state.survivors.intersection(member.ranks)
        if report.generation and not report.stopped and not (goes_on and state.phase in IN_PLACE):
            stop_node(turn, node, report.generation, "its generation is over")
        elif state.phase is Phase.RUNNING and member is not None:
            start_node(turn, member)
        elif state.phase is Phase.STOPPING and member is not None:
            stop_node(turn, node, state.number, "its generation is over")  # that it must not start
        elif state.phase is Phase.HALTING and member is not None:
            halt_node(turn, node, state.number, "its generation is over")
        elif state.phase is Phase.STARTING and member is not None and member.group_rank == 0 and state.store is None:
            turn.send(node, m.Prepare(state.term, state.number))
        return
    if member is None:
        return
    for exit in report.exits:
        if exit.rank in member.ranks and exit.rank not in turn.state.exits:
            ranks = [rank for name in state.members for rank in turn.state.report(name).ranks]
            whole = hangs.attributed(exit, ranks)
            turn.set(exits={**turn.state.exits, exit.rank: (node, whole)})
            rounds.feed_all(turn, commit.WorkersLost(frozenset({exit.rank}), supervision.explain(node, whole).summary))
    over = state.phase in (Phase.FORMING, Phase.PAUSING, Phase.SETTLING)
    if (state.phase is Phase.STOPPING or (over and state.scrapped)) and not report.stopped:
        stop_node(turn, node, report.generation, "its generation is over")
    elif (state.phase is Phase.HALTING or over) and not (report.stopped or report.halted):
        halt_node(turn, node, report.generation, "its generation is over")  # over: it was lost, and is back
    if report.at_end and state.phase is Phase.RUNNING and any(exit.ok for _, exit in turn.state.exits.values()):
        turn.send(node, m.Release(state.term, state.number))  # as others were: this node's own was lost
    barrier = turn.state.barrier
    if barrier is not None and barrier.stage is commit.Stage.PROPOSED and node not in barrier.accepted:
        turn.send(node, rounds.arm(turn.state, barrier))


def stop_node(turn: Turn, node: str, generation: int, why: str) -> None:
    state = turn.state
    turn.send(node, m.Stop(state.term, generation, why, state.policy.stop_grace_seconds))


def halt_node(turn: Turn, node: str, generation: int, why: str) -> None:
    turn.send(node, m.Halt(turn.state.term, generation, why))


def start_node(turn: Turn, member: Member) -> None:
    state = turn.state
    generation, store = state.generation, state.store
    if generation is None or store is None:
        return  # an adopted generation: its members run already, or it is given up
    turn.send(
        member.node,
        m.Start(
            state.term,
            generation.number,
            member.group_rank,
            len(generation.members),
            member.first_rank,
            generation.world_size,
            generation.members[0].node,
            store[0],
            store[1],
            state.budget.restarts,
            state.policy.restart.max_restarts or 0,
            state.resume,
            state.line,
            tuple(sorted(state.survivors.intersection(member.ranks))),
            keeping.keeper(generation, state.nodes, member),
            state.fetches.get(member.node),
            copying.slots_wanted(state),
        ),
    )


def disconnected(turn: Turn, name: str) -> None:
    node = turn.state.nodes.get(name)
    if node is None:
        return
    if name in turn.state.members and turn.state.phase not in (Phase.LEAVING, Phase.CLOSING):
        turn.set(nodes={**turn.state.nodes, name: replace(node, connected=False)})
        if membership.successor(node, turn.state.nodes.values()) is not None:
            lose(turn, name, f"node {node.hello.node_rank} was replaced by a new launcher")
    else:
        _forget(turn, name)


def _forget(turn: Turn, name: str) -> None:
    turn.set(nodes={key: node for key, node in turn.state.nodes.items() if key != name})


def lose(turn: Turn, name: str, why: str) -> None:
    """A node is gone, with its workers and its arenas."""
    state = turn.state
    _forget(turn, name)
    member = state.generation.member(name) if state.generation is not None else None
    if member is None:
        return
    turn.set(gone=state.gone | {name})
    rounds.feed_all(turn, commit.ArenasLost(frozenset(member.ranks), why))
    phases = (Phase.RUNNING, Phase.STARTING, Phase.HALTING, Phase.STOPPING)
    if state.failure is None and state.phase in phases and state.drain is None:
        turn.set(failure=Failure(FailureClass.NODE, name, why))


def is_deaf(state: State, now: float) -> bool:
    """Nobody is heard at the moment, so that it cannot be told who is cut off: the nodes, or this coordinator."""
    if state.drain is not None or not state.recorded:
        return False
    silence = DEAF_HEARTBEATS * state.policy.heartbeat_seconds
    return all(now - (node.lease_until - state.policy.lease_seconds) >= silence for node in state.nodes.values())


def place(turn: Turn, name: str) -> str:
    member = turn.state.generation.member(name) if turn.state.generation is not None else None
    node = turn.state.nodes.get(name)
    host = f" ({node.hello.host})" if node is not None else ""
    return f"{member.group_rank if member else '?'}{host}"
