"""Which rank writes which box, and where the boxes lie in its pack."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod

import msgspec

from ftrain.core.layout import Box, Mesh, TensorSpec, align, describe, image_of, item_bytes, local_shard, unravel, whole
from ftrain.core.placement import REPLICATED
from ftrain.errors import MismatchedState


class WriteItem(msgspec.Struct, frozen=True, gc=False):
    """One box that one rank writes, C-contiguous."""

    spec: TensorSpec
    box: Box
    nbytes: int
    offset: tuple[int, ...] | None = None  # of the box in the rank's local tensor; None where it is all of that


def write_plan(specs_by_rank: Sequence[Sequence[TensorSpec]]) -> tuple[tuple[WriteItem, ...], ...]:
    """For each rank the boxes that it writes, in the order of its own specs.

    Every box has one writer among the ranks that hold it; bytes are balanced, largest box first; the same input
    gives the same plan everywhere. Ranks with the same specs should share one sequence object: the work is then
    done once for all of them. Raises `MismatchedState` where ranks disagree about a tensor or a rank of its mesh
    does not name it.
    """
    loads = [0] * len(specs_by_rank)
    jobs: list[tuple[int, int, WriteItem, tuple[int, ...]]] = []
    plan: list[list[WriteItem]] = [[] for _ in specs_by_rank]
    for specs, ranks in _by_content(specs_by_rank):
        for spec in specs:
            if spec.private:
                item = WriteItem(spec, whole(spec.shape), spec.nbytes)
                for rank in ranks:
                    plan[rank].append(item)
                    loads[rank] += item.nbytes
    for number, named in enumerate(_shared(specs_by_rank)):
        for (box, offset), holders in _holders(named).items():
            spec = named[0][0]
            nbytes = box.volume * item_bytes(spec.dtype, spec.key)
            jobs.append((-nbytes, number, WriteItem(spec, box, nbytes, offset), holders))
    jobs.sort(key=lambda job: (len(job[3]) > 1, *job[:2], job[2].box))
    _assign(jobs, loads, plan)
    return tuple(_in_order(items, specs) for items, specs in zip(plan, specs_by_rank, strict=True))


def has_only_replicas(specs_by_rank: Sequence[Sequence[TensorSpec]]) -> bool:
    """Whether two ranks at least hold each box of what ranks share."""
    return all(len(holders) > 1 for named in _shared(specs_by_rank) for holders in _holders(named).values())


def _shared(specs_by_rank: Sequence[Sequence[TensorSpec]]) -> Iterable[list[tuple[TensorSpec, tuple[int, ...]]]]:
    """Of each tensor that is not one rank's alone all views, and which ranks have each."""
    shared: dict[str, list[tuple[TensorSpec, tuple[int, ...]]]] = {}
    for specs, ranks in _by_content(specs_by_rank):
        for spec in specs:
            if not spec.private:
                shared.setdefault(spec.key, []).append((spec, ranks))
    return shared.values()


def _by_content(
    specs_by_rank: Sequence[Sequence[TensorSpec]],
) -> Iterable[tuple[Sequence[TensorSpec], tuple[int, ...]]]:
    groups: dict[int, list[int]] = {}
    for rank, specs in enumerate(specs_by_rank):
        groups.setdefault(id(specs), []).append(rank)
    return [(specs_by_rank[ranks[0]], tuple(ranks)) for ranks in groups.values()]


_Placed = tuple[Box, tuple[int, ...] | None]  # a box, and its offset as in `WriteItem`


def _holders(named: Sequence[tuple[TensorSpec, tuple[int, ...]]]) -> dict[_Placed, tuple[int, ...]]:
    """Which ranks hold each box of one tensor, of which `named` are all the views."""
    first, first_ranks = named[0]
    if len(named) == 1 and first.mesh is None:
        return {(whole(first.shape), None): first_ranks}
    naming: dict[Mesh | None, set[int]] = {}
    for spec, ranks in named:
        if _nature(spec) != _nature(first):
            raise MismatchedState(
                f"{first.key}: rank {first_ranks[0]} has it as {describe(first)}, "
                f"rank {ranks[0]} as {describe(spec)}; use other keys for tensors that differ, or mark them private"
            )
        naming.setdefault(spec.mesh, set()).update(ranks)
    boxes: dict[_Placed, set[int]] = {}
    empty = prod(first.shape) == 0
    for mesh, ranks_naming in naming.items():
        if mesh is None:
            boxes.setdefault((whole(first.shape), None), set()).update(ranks_naming)
            continue
        absent = set(mesh.ranks) - ranks_naming
        if absent:
            raise MismatchedState(
                f"{first.key}: rank {min(absent)} is in its mesh, but does not save it; all ranks of a mesh must"
            )
        view = TensorSpec(first.key, first.dtype, first.shape, mesh, first.placements)
        for holders in _replicas(mesh, first.placements):
            if empty:
                boxes.setdefault((whole(first.shape), None), set()).update(holders)
                continue
            shard = local_shard(view, holders[0])
            assert shard is not None
            for box, offset in zip(shard.boxes, shard.offsets, strict=True):
                placed = (box, None if box.shape == shard.shape else offset)
                boxes.setdefault(placed, set()).update(holders)
    return {placed: tuple(sorted(holders)) for placed, holders in boxes.items()}


def _nature(spec: TensorSpec) -> tuple[object, ...]:
    """What all ranks must agree on. Meshes of the same form may differ in their ranks: replicas of a sharded group."""
    return spec.dtype, spec.shape, spec.placements, None if spec.mesh is None else spec.mesh.shape


@lru_cache(maxsize=256)
def _replicas(mesh: Mesh, placements: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The mesh's ranks in groups that hold the same shard."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, rank in enumerate(mesh.ranks):
        at = unravel(position, mesh.shape)
        shard = tuple(
            coordinate for coordinate, placement in zip(at, placements, strict=True) if placement != REPLICATED
        )
        groups.setdefault(shard, []).append(rank)
    return tuple(tuple(group) for group in groups.values())


def _assign(
    jobs: Iterable[tuple[int, int, WriteItem, tuple[int, ...]]], loads: list[int], plan: list[list[WriteItem]]
) -> None:
    heaps: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for _, _, item, holders in jobs:
        heap = heaps.setdefault(holders, [(0, rank) for rank in holders])
        # Loads only grow, so an entry that is out of date belongs further down.
        while heap[0][0] != loads[heap[0][1]]:
            heapq.heapreplace(heap, (loads[heap[0][1]], heap[0][1]))
        rank = heap[0][1]
        plan[rank].append(item)
        loads[rank] += item.nbytes


def _in_order(items: Iterable[WriteItem], specs: Sequence[TensorSpec]) -> tuple[WriteItem, ...]:
    order = {(spec.key, spec.private): place for place, spec in enumerate(specs)}
    return tuple(sorted(items, key=lambda item: (order[item.spec.key, item.spec.private], item.box)))


# ------------------------------------------------------------------------------------------------------ a pack's image


class SlotLayout(msgspec.Struct, frozen=True, gc=False):
    """A pack's bytes, in memory as in the file: boxes, zeros, the shard index. All offsets and sizes in bytes."""

    offsets: tuple[int, ...]  # of each item
    payload_bytes: int  # the length of the zarr array: `chunks` times `chunk_bytes`
    chunk_bytes: int
    index_offset: int
    image_bytes: int

    @property
    def chunks(self) -> int:
        return self.payload_bytes // self.chunk_bytes


def slot_layout(items: Sequence[WriteItem]) -> SlotLayout:
    """Lay the boxes out, each on a 4 KiB boundary, and the shard index so that it ends the image.

    zarr's `bytes` codec knows no partial chunk, so the payload is cut into equal chunks of at most 4 MiB,
    themselves multiples of 4 KiB: at most 4 KiB a chunk are lost, and a small state makes a small file.
    """
    offsets, end = [], 0
    for item in items:
        offsets.append(end)
        end += align(item.nbytes)
    return SlotLayout(tuple(offsets), *image_of(end))
