"""How ranks come to one plan: who writes which box of which tensor."""

from __future__ import annotations

from collections.abc import Sequence

from ftrain.checkpoint.exchange import encode_specs, exchange_specs
from ftrain.checkpoint.garbage import no_collection
from ftrain.checkpoint.peers import Peers
from ftrain.checkpoint.writing.pack_plan import PackPlan
from ftrain.core.layout import TensorSpec
from ftrain.core.manifest import check_coverage
from ftrain.core.messages import Attempt
from ftrain.core.write_plan import write_plan
from ftrain.errors import MismatchedState
from ftrain.storage.zarr_view import references


class Agreed:
    """A plan that all ranks have made alike: this rank's pack, and on rank 0 how all packs together look to zarr."""

    def __init__(
        self, specs: Sequence[TensorSpec], everybody: list[list[TensorSpec]], digests: list[bytes], rank: int
    ) -> None:
        self.specs = specs
        self.digests = digests
        plan = write_plan(everybody)
        world_size = len(everybody)
        self.pack = PackPlan(rank, world_size, plan[rank])
        self.references = b""
        if rank == 0:
            others = [PackPlan(other, world_size, plan[other]) for other in range(1, world_size)]
            indexes = [pack.index(Attempt(0, 0, 0), {}) for pack in (self.pack, *others)]
            check_coverage(indexes, "the plan")
            self.references = references(indexes)


class Plans:
    """Remembers the last plan, which is usually the next one."""

    def __init__(self) -> None:
        self._last: Agreed | None = None
        self._encoded = b""

    def known(self, specs: Sequence[TensorSpec], peers: Peers) -> Agreed | None:
        """The plan for these specs, if this rank would make the same as last time."""
        last = self._last
        if last is None or (last.pack.rank, last.pack.world_size) != (peers.rank, peers.world_size):
            return None
        is_same = specs is last.specs or (len(specs) == len(last.specs) and all(map(_same, specs, last.specs)))
        return last if is_same else None

    def agree(self, specs: Sequence[TensorSpec], peers: Peers) -> Agreed:
        """The plan for these specs. A collective; raises `MismatchedState` on every rank where ranks disagree."""
        known = self.known(specs, peers)
        if known is not None and peers.world_size == 1:
            return known
        if known is None:
            refuse_twice(specs)
            self._encoded = encode_specs(specs)
        everybody, digests = exchange_specs(list(specs), self._encoded, peers.exchange, peers.rank)
        if known is not None and known.digests == digests:
            return known
        self._last = None
        with no_collection():
            self._last = Agreed(specs, everybody, digests, peers.rank)
        return self._last


def _same(a: TensorSpec, b: TensorSpec) -> bool:
    return a is b or a == b


def refuse_twice(specs: Sequence[TensorSpec]) -> None:
    """Raises `MismatchedState` where two tensors have one key."""
    seen: set[tuple[str, bool]] = set()
    for spec in specs:
        name = (spec.key, spec.private)
        if name in seen:
            raise MismatchedState(f"{spec.key}: two tensors have this key")
        seen.add(name)
