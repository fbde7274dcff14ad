"""What a run is hurt with, by a seed: a plan that is the same each time, whatever the run does meanwhile."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from random import Random

STEPS_BETWEEN = 4  # finished between two faults, on average
STEPS_PER_FAULT = 8  # of the whole run: some are done while faults last
SOON_SECONDS = 0.6  # a recovery takes about as long: what strikes within it, strikes while it lasts


class Need(Enum):
    """What a kind of fault takes."""

    NODES = auto()  # several
    ALONE = auto()  # a coordinator by itself
    HOSTED = auto()  # a coordinator in node 0, and other nodes
    DISK = auto()  # a run directory on a file system of its own


@dataclass(frozen=True, slots=True)
class Kind:
    """How often a fault strikes, beside the others, how long it lasts, and what it takes."""

    weight: float
    seconds: tuple[float, float] = (0.0, 0.0)  # shortest and longest; of those past the lease, in addition to it
    past_lease: bool = False
    needs: frozenset[Need] = frozenset()
    faults: int = 1  # how many injuries it is


def _kind(weight: float, *needs: Need, seconds: tuple[float, float] = (0.0, 0.0), past: bool = False) -> Kind:
    return Kind(weight, seconds, past, frozenset(needs))


RANKS: dict[str, Kind] = {
    "kill a rank": _kind(40),
    "kill two ranks at once": Kind(8, faults=2),
    "kill all ranks": Kind(1),
    "stop a rank": _kind(5),
    "kill a nursery": _kind(3),
}
NODES: dict[str, Kind] = {
    "kill a node": _kind(3, Need.NODES),
    "kill the coordinator's node": _kind(3, Need.HOSTED),
    "stop an agent": _kind(4, seconds=(0.2, 1.5)),
    "stop an agent past its lease": _kind(1.5, Need.NODES, seconds=(0.5, 2.0), past=True),
    "kill the coordinator": _kind(6, Need.ALONE),
    "stop the coordinator": _kind(2, Need.ALONE, seconds=(0.2, 2.0)),
    "stop the coordinator past the lease": _kind(1, Need.ALONE, seconds=(0.5, 2.0), past=True),
}
PARTS: dict[str, Kind] = {
    "cut a link": _kind(4, Need.NODES, seconds=(0.2, 1.5)),
    "cut a link one way": _kind(4, Need.NODES, seconds=(0.2, 1.5)),
    "cut a link past the lease": _kind(1, Need.NODES, seconds=(0.5, 2.0), past=True),
    "cut a link one way past the lease": _kind(1, Need.NODES, seconds=(0.5, 2.0), past=True),
    "break a link": _kind(4, Need.NODES),
    "full disk": _kind(4, Need.DISK, seconds=(0.5, 2.5)),
    "slow disk": _kind(4, Need.DISK, seconds=(0.5, 2.5)),
}
KINDS = {**RANKS, **NODES, **PARTS}
WHILE = ", while another fault is recovered from"  # after a kind's name, in what is counted
FOLLOWED = 0.3  # of all faults, by another one at once


@dataclass(frozen=True, slots=True)
class Fault:
    """One injury. It strikes after `steps` more steps, or `after_seconds` the fault before it where that is set."""

    kind: str
    steps: int
    after_seconds: float
    ranks: tuple[int, ...]  # which, in order: as many of the first of them as the kind takes
    node: int  # of those that are not the coordinator's, where the kind does not say which
    to_node: bool  # which way, of a cut link
    seconds: float

    @property
    def name(self) -> str:
        """As it is counted."""
        return self.kind if self.steps else self.kind + WHILE


@dataclass(frozen=True, slots=True)
class Shape:
    """What there is to be hurt. `spared` is a rank that is never hurt itself, -1 for none."""

    nodes: int = 2
    ranks: int = 2  # of each node
    alone: bool = False  # the coordinator is a process by itself
    disk: bool = False
    spared: int = -1
    lease_seconds: float = 3.0

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks

    def suffers(self, kind: Kind) -> bool:
        has = {
            Need.NODES: self.nodes > 1,
            Need.ALONE: self.alone,
            Need.HOSTED: self.nodes > 1 and not self.alone,
            Need.DISK: self.disk,
        }
        return all(has[need] for need in kind.needs)


def plan(seed: int, count: int, shape: Shape, kinds: Collection[str] = tuple(KINDS)) -> tuple[Fault, ...]:
    """`count` faults: a function of its arguments alone."""
    random = Random(seed)
    names = [name for name, kind in KINDS.items() if name in kinds and shape.suffers(kind)]
    weights = [KINDS[name].weight for name in names]
    ranks = [rank for rank in range(shape.world_size) if rank != shape.spared]
    found: list[Fault] = []
    for number in range(count):
        [name] = random.choices(names, weights)
        kind = KINDS[name]
        follows = number > 0 and found[-1].steps > 0 and random.random() < FOLLOWED
        shortest, longest = kind.seconds
        found.append(
            Fault(
                name,
                0 if follows else random.randint(1, 2 * STEPS_BETWEEN - 1),
                random.uniform(0.0, SOON_SECONDS) if follows else 0.0,
                tuple(random.sample(ranks, len(ranks))),
                random.randrange(1, shape.nodes) if shape.nodes > 1 else 0,
                random.random() < 0.5,
                random.uniform(shortest, longest) + (shape.lease_seconds if kind.past_lease else 0.0),
            )
        )
    return tuple(found)
