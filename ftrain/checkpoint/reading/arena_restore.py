"""A snapshot that lies in the arenas of all ranks, put back without storage.

Each rank takes what it wrote itself from its own arena, by copies within memory, and gets from others what they wrote
and it wants: replicated tensors, whose writing is shared among the ranks that hold them. Each byte leaves its writer
once for each rank that wants it, or once for all.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from ftrain import _native
from ftrain.checkpoint.exchange import encode_specs, exchange_specs
from ftrain.checkpoint.staging.arena import Arena, Image
from ftrain.checkpoint.staging.device import begin_upload
from ftrain.checkpoint.staging.host import lies_in_host_memory
from ftrain.checkpoint.state.items import TensorItem, part_of
from ftrain.checkpoint.state.source import TensorInfo
from ftrain.checkpoint.state.tracked import Tracked
from ftrain.checkpoint.wire import Checksum, fill_from_bytes, gather_bytes, runs
from ftrain.core import plain as plain_data
from ftrain.core.layout import Box, TensorSpec, item_bytes, local_shard
from ftrain.core.manifest import BoxRecord, PackIndex, decode_index
from ftrain.core.messages import Attempt
from ftrain.errors import CorruptCheckpoint, FtrainError, MismatchedState, Unavailable

COPY_THREADS = 2


def restore_from_arenas(
    tracked: Tracked, arena: Arena, slot: int, attempt: Attempt, rank: int, world_size: int
) -> dict[str, Any]:
    """Put back the snapshot of `attempt`, which every rank has sealed in `slot` of its arena: slots may differ.

    A collective of all ranks of the default group, which are as many as took the snapshot, on the same mesh. Returns
    this rank's plain data, of which `tracked` is taken over already. The indexes are proved by their checksums, and so
    is what travels; the boxes in the arenas have none yet. Where one rank cannot go on, it raises on all of them:
    `MismatchedState`, `Unavailable`, or `CorruptCheckpoint`. Until the tensors agree, nothing is changed; after
    damage on the way, what was filled is of no use.
    """
    index: PackIndex | None = None
    error = ""
    try:
        index = _read_index(arena, slot, attempt, rank, world_size)
    except FtrainError as found:
        error = str(found)
    _raise_together(error, Unavailable)
    assert index is not None
    sealed = _Sealed(index, arena.image(slot))
    items: list[TensorItem] = []
    try:
        items = tracked.prepare(sealed, rank)
    except FtrainError as found:
        error = str(found)
    _raise_together(error, MismatchedState)
    sealed.plan([item.spec for item in items if not item.spec.private])
    tracked.fill(sealed, rank, rank, items)
    return sealed.plain(rank)


def _read_index(arena: Arena, slot: int, attempt: Attempt, rank: int, world_size: int) -> PackIndex:
    if slot >= arena.slots:
        raise CorruptCheckpoint(f"the arena of rank {rank} has no slot {slot}")
    index = decode_index(arena.read_index(slot), f"slot {slot} of the arena of rank {rank}", sealed=True)
    if (index.attempt, index.rank, index.world_size) != (attempt, rank, world_size):
        raise CorruptCheckpoint(
            f"slot {slot} of the arena of rank {rank} of {world_size} holds {index.attempt} of rank {index.rank} of "
            f"{index.world_size}, not {attempt}"
        )
    if index.image_bytes > arena.image_bytes(slot):
        raise CorruptCheckpoint(f"slot {slot} of the arena of rank {rank} is shorter than its index says")
    return index


def _raise_together(error: str, kind: type[FtrainError]) -> None:
    """A collective: raises on all ranks if one has an error."""
    for rank, found in enumerate(gather_bytes(error.encode())):
        if found:
            raise kind(f"the snapshots in the arenas cannot be restored: rank {rank}: {found.decode()}")


@dataclass(frozen=True, slots=True)
class _Moving:
    """A box that travels."""

    key: str
    box: Box
    nbytes: int
    on_device: bool = False  # what travels lies in the arenas, or in buffers beside them


@dataclass(slots=True)
class _Route:
    """All boxes that `source` sends to the same ranks."""

    source: int
    targets: tuple[int, ...]
    boxes: list[_Moving] = field(default_factory=list)


class _Sealed:
    """The snapshot as `Tracked` restores from it. Making one is a collective, and so are `plan` and what follows it."""

    def __init__(self, index: PackIndex, image: Image) -> None:
        self._index = index
        self._image = image
        self._rank, self._world_size = index.rank, index.world_size
        begin = image.address - image.mapping.address
        self._memory = torch.frombuffer(image.mapping.view(), dtype=torch.uint8, offset=begin, count=image.nbytes)
        self._shared = {(one.key, one.box): one for one in index.boxes if not one.private}
        self._private = {one.key: one for one in index.boxes if one.private}
        written = [TensorSpec(one.key, one.dtype, one.shape) for one in self._shared.values()]
        everybody, _ = exchange_specs(written, encode_specs(written), gather_bytes, self._rank)
        self._tensors = {
            spec.key: TensorInfo(spec.dtype, spec.shape, private=False)
            for specs in {id(specs): specs for specs in everybody}.values()
            for spec in specs
        }
        self._routes: list[_Route] = []

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def private_tensors(self, rank: int) -> dict[str, TensorInfo]:
        assert rank == self._rank
        return {key: TensorInfo(one.dtype, one.shape, private=True) for key, one in self._private.items()}

    def plain(self, rank: int) -> dict[str, Any]:
        assert rank == self._rank
        return {name: plain_data.decode(value) for name, value in self._index.plain.items()}

    def others(self, rank: int) -> tuple[()]:
        """None: the mesh is the same, so that a rank has all that it needs."""
        assert rank == self._rank
        return ()

    def plan(self, specs: Sequence[TensorSpec]) -> None:
        """Work out with all ranks what travels where, given the shared tensors that this rank wants.

        Raises `MismatchedState` on every rank where a tensor that somebody wants is not in the arenas, or in other
        boxes.
        """
        everybody, _ = exchange_specs(list(specs), encode_specs(specs), gather_bytes, self._rank)
        wanting = _wanting(everybody)
        # Each rank says which of the boxes that it wants it has itself: it holds all that it writes.
        own = _boxes(specs, self._rank)
        has = [place for place, (spec, box) in enumerate(own) if (spec.key, box) in self._shared]
        self._routes, found = [], set()
        for source, told in enumerate(gather_bytes(array("I", has).tobytes())):
            routes: dict[tuple[int, ...], _Route] = {}
            held = _boxes(everybody[source], source) if told else []
            for place in array("I", told):
                spec, box = held[place]
                found.add((spec.key, box))
                targets = tuple(rank for rank in wanting.get((spec.key, box), ()) if rank != source)
                route = routes.setdefault(targets, _Route(source, targets))
                route.boxes.append(_Moving(spec.key, box, box.volume * item_bytes(spec.dtype, spec.key)))
            self._routes += [route for targets, route in routes.items() if targets]
        missing = sorted({key for key, box in wanting if (key, box) not in found})
        if missing:
            raise MismatchedState(
                f"the snapshots in the arenas are of another model, optimizer or mesh: {', '.join(missing[:5])} "
                "are not there, or in other boxes"
            )

    def read_into(self, items: Sequence[TensorItem], rank: int, *, elsewhere: Collection[str] = ()) -> None:
        """Fill local tensors: private ones from this rank's arena; shared ones, those of `plan`, from all arenas."""
        del elsewhere
        if items and items[0].spec.private:
            self._copy([(self._private[item.spec.key], item.local) for item in items])
            return
        boxes = {
            (item.spec.key, box): item.local if box.shape == shard.shape else part_of(item.local, offset, box.shape)
            for item in items
            if (shard := local_shard(item.spec, rank)) is not None
            for box, offset in zip(shard.boxes, shard.offsets, strict=True)
        }
        self._copy([(record, boxes[wanted]) for wanted, record in self._shared.items() if wanted in boxes])
        sums: dict[int, int] = {}
        for number, route in enumerate(self._routes):
            checksum = Checksum()
            for run in runs(route.boxes):
                if rank == route.source:
                    self._send(run, route, checksum)
                elif rank in route.targets:
                    self._receive(run, route, boxes, checksum)
            if rank == route.source or rank in route.targets:
                sums[number] = checksum.value
        self._compare(sums)

    def _copy(self, pairs: Sequence[tuple[BoxRecord, torch.Tensor]]) -> None:
        """Within this rank's memory, and from it to its devices."""
        copies, uploads = [], []
        for record, local in pairs:
            address = self._image.address + record.offset
            if local.device.type == "cuda":
                uploads.append((address, local))
            elif lies_in_host_memory(local) and record.nbytes:
                copies.append((local.data_ptr(), address, record.nbytes))
            elif record.nbytes:
                fill_from_bytes(local, self._bytes(record))
        ticket = begin_upload(uploads, self._image) if uploads else None
        _native.copy_batch(copies, COPY_THREADS)
        if ticket is not None:
            ticket.wait()

    def _bytes(self, record: BoxRecord) -> torch.Tensor:
        return self._memory[record.offset : record.offset + record.nbytes]

    def _send(self, run: Sequence[_Moving], route: _Route, checksum: Checksum) -> None:
        parts = [self._bytes(self._shared[one.key, one.box]) for one in run]
        data = parts[0] if len(parts) == 1 else torch.cat(parts)
        checksum.add(data)
        if self._is_for_all(route):
            dist.broadcast(data, route.source)
        else:
            for target in route.targets:
                dist.send(data, target)

    def _receive(
        self,
        run: Sequence[_Moving],
        route: _Route,
        boxes: Mapping[tuple[str, Box], torch.Tensor],
        checksum: Checksum,
    ) -> None:
        first = boxes[run[0].key, run[0].box]
        straight = len(run) == 1 and lies_in_host_memory(first)
        if straight:
            data = first.detach().reshape(-1).view(torch.uint8)
        else:
            data = torch.empty(sum(one.nbytes for one in run), dtype=torch.uint8)
        if self._is_for_all(route):
            dist.broadcast(data, route.source)
        else:
            dist.recv(data, route.source)
        checksum.add(data)
        if not straight:
            for one, part in zip(run, torch.split(data, [one.nbytes for one in run]), strict=True):
                fill_from_bytes(boxes[one.key, one.box], part)

    def _is_for_all(self, route: _Route) -> bool:
        return len(route.targets) == self._world_size - 1

    def _compare(self, sums: Mapping[int, int]) -> None:
        """With all ranks: what was sent is what arrived. Raises `CorruptCheckpoint` on all of them otherwise."""
        told = [msgspec.json.decode(one, type=dict[int, int]) for one in gather_bytes(msgspec.json.encode(sums))]
        for number, route in enumerate(self._routes):
            for target in route.targets:
                if told[target][number] != told[route.source][number]:
                    raise CorruptCheckpoint(
                        f"what rank {target} received from rank {route.source} does not match its checksum: the "
                        "network or a memory damages data"
                    )


def _wanting(everybody: Sequence[Sequence[TensorSpec]]) -> dict[tuple[str, Box], list[int]]:
    """The ranks that want each box that has elements."""
    found: dict[tuple[str, Box], list[int]] = {}
    for rank, specs in enumerate(everybody):
        for spec, box in _boxes(specs, rank):
            found.setdefault((spec.key, box), []).append(rank)
    return found


def _boxes(specs: Sequence[TensorSpec], rank: int) -> list[tuple[TensorSpec, Box]]:
    """The boxes that a rank holds and that have elements."""
    shards = [(spec, local_shard(spec, rank)) for spec in specs]
    return [(spec, box) for spec, shard in shards if shard is not None for box in shard.boxes]
