"""What one schedule looks like: sizes, policy and faults, all drawn from its seed before anything happens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from ftrain.core.membership import FormationPolicy
from ftrain.core.retention import RetentionPolicy
from ftrain.core.run_state import RunPolicy
from ftrain.core.schedule import CheckpointPolicy
from ftrain.core.supervision import RestartPolicy

RUN_ID = "simulated"
VERSION = "0"
FAULT_EVENTS = (60, 320)  # faults stop after so many events of the world ...
FAULT_SECONDS = 90.0  # ... or at this virtual time
KINDS = (
    "kill worker",
    "worker raises",
    "crash agent",
    "crash coordinator",
    "pause coordinator",
    "second coordinator",
    "pause agent",
    "break link",
    "partition",
    "one-way partition",
    "storage outage",
    "power cut",
    "blackout",
    "damage commit",
    "SIGTERM to one",
    "SIGTERM to all",
    "SIGINT",
)
MOMENTS = (
    "run",
    "generation",
    "prepare",
    "start",
    "arm",
    "verdict",
    "publish",
    "commit",
    "committed",
    "retire",
    "finish",
)
WEIGHTS = (6, 3, 4, 5, 4, 2, 2, 3, 2, 2, 3, 3, 2, 4, 1, 1, 0.3)


@dataclass(frozen=True, slots=True)
class Network:
    """How often a message is dropped, doubled, overtaken or late. More than TCP would ever do to it."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    late: float = 0.0


@dataclass(frozen=True, slots=True)
class Disk:
    """How often an operation fails, or its reply is lost though it happened, will happen later, or never will."""

    fail: float = 0.0
    unknown: float = 0.0
    late: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    nodes: int
    spares: int
    processes: int
    total_steps: int  # 0 for endless
    step_seconds: float
    joins: bool  # the script calls ftrain.join()
    policy: RunPolicy
    network: Network
    disk: Disk
    faults: tuple[tuple[int, str], ...]  # (number of the event before which it strikes, kind)
    aimed: dict[tuple[str, int], str]  # (a coordinator's act, how many of them) -> kind that strikes right after it
    fault_events: int
    to_the_end: bool  # do not stop at the first new commit after the faults
    replicated: bool = False  # all ranks are replicas of each other
    replays: bool = True  # and can do a step again by themselves
    peers: bool = True  # nodes keep copies of one another
    roomy: bool = True  # there is memory for a third slot


def calm(seed: int, nodes: int = 2, processes: int = 2, total_steps: int = 9, every_steps: int = 3) -> Plan:
    """A schedule in which nothing goes wrong."""
    policy = _policy(nodes, nodes, CheckpointPolicy(every_steps, 0.0, RetentionPolicy(2), 15.0))
    return Plan(seed, nodes, 0, processes, total_steps, 0.4, True, policy, Network(), Disk(), (), {}, 0, True)


def draw(seed: int) -> Plan:
    """The schedule of this seed."""
    rng = Random(seed)
    nodes = rng.choice((1, 1, 2, 2, 2, 3))
    processes = rng.choice((1, 1, 2)) if nodes < 3 else 1
    nodes_min = nodes if rng.random() < 0.6 else max(1, nodes - 1)
    keep = RetentionPolicy(rng.choice((1, 1, 2, 3)), every_steps=seed % 3 and 4)
    if rng.random() < 0.7:
        checkpoint = CheckpointPolicy(rng.choice((1, 2, 2, 3, 4)), 0.0, keep, 15.0)
    else:
        checkpoint = CheckpointPolicy(0, rng.choice((0.5, 1.0, 2.0)), keep, 15.0)
    snapshots = rng.random()
    if snapshots < 0.3:
        checkpoint = replace(checkpoint, snapshot_steps=rng.choice((1, 1, 2)))
    elif snapshots < 0.6:
        checkpoint = replace(checkpoint, snapshot_seconds=rng.choice((0.5, 2.0)))
    network = Network()
    if rng.random() < 0.5:
        network = Network(*(rng.choice((0.0, 0.0, 0.03, 0.15)) for _ in range(4)))
    disk = Disk()
    if rng.random() < 0.5:
        disk = Disk(*(rng.choice((0.0, 0.0, 0.05, 0.25)) for _ in range(3)))
    fault_events = rng.randint(*FAULT_EVENTS)
    count = rng.choice((0, 1, 1, 2, 2, 3, 4, 6))
    kinds = rng.choices(KINDS, WEIGHTS, k=count)
    aimed = {}
    if rng.random() < 0.4:
        aimed[rng.choice(MOMENTS), rng.choice((1, 1, 1, 2, 2, 3))] = rng.choices(KINDS, WEIGHTS)[0]
    faults = tuple(sorted((rng.randint(5, fault_events), kind) for kind in kinds))
    plan = Plan(
        seed=seed,
        nodes=nodes,
        spares=1 if rng.random() < 0.1 else 0,
        processes=processes,
        total_steps=0 if rng.random() < 0.15 else rng.randint(5, 12),
        step_seconds=rng.choice((0.1, 0.4, 0.4, 1.0)),
        joins=rng.random() < 0.96,
        policy=_policy(nodes_min, nodes, checkpoint),
        network=network,
        disk=disk,
        faults=faults,
        aimed=aimed,
        fault_events=fault_events,
        to_the_end=rng.random() < 0.3,
        replicated=rng.random() < 0.5,
        replays=rng.random() < 0.8,
        peers=rng.random() < 0.7,
    )
    if rng.random() < 0.3:
        checkpoint = replace(checkpoint, snapshot_steps=0, snapshot_seconds=2.0, snapshot_auto=True)
        plan = replace(plan, policy=replace(plan.policy, checkpoint=checkpoint), roomy=rng.random() < 0.8)
    return plan


def _policy(nodes_min: int, nodes_max: int, checkpoint: CheckpointPolicy) -> RunPolicy:
    return RunPolicy(
        RUN_ID,
        VERSION,
        FormationPolicy(nodes_min, nodes_max, wait_seconds=10_000.0, last_call_seconds=1.0),
        RestartPolicy(without_progress_max=1000, backoff_seconds=(0.0, 0.5, 1.0)),
        checkpoint,
        lease_seconds=6.0,
        heartbeat_seconds=2.0,
        settle_seconds=10.0,
        halt_seconds=8.0,
        stop_grace_seconds=2.0,
        goodbye_seconds=2.0,
    )
