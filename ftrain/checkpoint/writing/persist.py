"""A pack and its index, durably, from wherever its bytes lie. Runs in the agent, too; knows nothing of torch."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.writing.pack_plan import PackPlan
from ftrain.checkpoint.writing.unchanged import Memory, Split, split, written
from ftrain.core.codec import Codec
from ftrain.core.frames import is_cut
from ftrain.core.layout import ITEM_BYTES, align, image_of
from ftrain.core.manifest import PackIndex, data_path, decode_index, encode_index, index_path, pack_path
from ftrain.core.messages import Attempt, PackRecord
from ftrain.errors import CorruptCheckpoint
from ftrain.storage.base import Effort, Storage
from ftrain.storage.pack import Pack
from ftrain.storage.zarr_view import pack_metadata, shard_index

NICE_BESIDE_TRAINING = 10
PROCESSORS_SHARE_MAX = 1 / 80  # of the node's, what persisting takes of them while training wants them all


def beside_training(ranks: int, bytes_per_second_max: int = 0) -> Effort:
    """How hard to work on the pack of one of `ranks`, written on this node at a time while they train."""
    processors = len(os.sched_getaffinity(0)) * PROCESSORS_SHARE_MAX / ranks
    return Effort(1, NICE_BESIDE_TRAINING, bytes_per_second_max, processors)


def persist_slot(
    storage: Storage,
    attempt: Attempt,
    rank: int,
    arena: Arena,
    slot: int,
    should_stop: Callable[[], bool],
    effort: Effort | None = None,
    memory: Memory | None = None,
    base: Attempt | None = None,
    codec: Codec | None = None,
) -> PackRecord:
    """Write the pack that `slot` holds, and its index, durably: once this returned, the rank is prepared.

    With `memory`, boxes that the commit `base` has with the same bytes are referred to, and not written again. With
    `codec`, what is written is compressed. The `effort` is by default that of one rank `beside_training`. The slot must
    stay sealed meanwhile.

    Raises `CorruptCheckpoint` where it holds something else, and `StorageError` where storage fails, or soon after
    `should_stop` answered True. What was written until then is garbage that `retain` removes.
    """
    arena.attach()
    effort = effort or beside_training(1)
    where = f"the snapshot of rank {rank} in slot {slot} of its arena"
    sealed = decode_index(arena.read_index(slot), where, sealed=True)
    image = arena.image(slot)
    if (sealed.attempt, sealed.rank) != (attempt, rank) or sealed.image_bytes > image.nbytes:
        raise CorruptCheckpoint(f"{where} is of rank {sealed.rank}, {sealed.attempt}, instead of {attempt}")
    addresses = [image.address + box.offset for box in sealed.boxes]
    known = memory.of(rank, base) if memory is not None else {}
    found = split(sealed.boxes, addresses, known, should_stop)
    index = _without(sealed, found) if found.stored else sealed
    changed = array("Q", [addresses[number] for number in found.changed])
    if codec is not None and _has_frames(index):
        record = _write_encoded(storage, attempt.path, index, changed, codec, effort, should_stop)
    else:
        pack = _pack(
            index,
            array("Q", [box.offset for box in index.boxes]),
            changed,
            array("Q", [box.nbytes for box in index.boxes]),
            0 if found.stored else image.address,
        )

        def finish(boxes: list[int], chunks: list[int]) -> bytes:
            return encode_index(_summed(index, boxes, chunks))

        record = _write(storage, attempt.path, index, pack, finish, effort, should_stop)
    if memory is None:
        return record
    there = written(found, sealed.boxes, addresses, known, attempt, record.index_sha256, should_stop)
    memory.remember(rank, base, attempt, there)
    referred = [sealed.boxes[number].nbytes for number in found.stored]
    return msgspec.structs.replace(
        record, payload_bytes=record.payload_bytes + sum(referred), tensors=record.tensors + len(referred)
    )


def persist_plan(
    storage: Storage,
    base: str,
    attempt: Attempt,
    plan: PackPlan,
    addresses: array[int],
    plain: Mapping[str, Any],
    effort: Effort,
    image: int = 0,
    codec: Codec | None = None,
) -> PackRecord:
    """Write a pack below `base` from boxes that lie at `addresses`, C-contiguous; its index is durable, too, on return.

    With `image` they lie as in the file from that address on; otherwise they go through buffers of bounded size. With
    `codec` they are compressed there. `plain` is encoded already. Raises `StorageError`.
    """
    index = plan.index(attempt, plain)
    if codec is not None and _has_frames(index):
        return _write_encoded(storage, base, index, addresses, codec, effort, lambda: False)
    pack = _pack(index, plan.offsets, addresses, plan.sizes, image)

    def finish(boxes: list[int], chunks: list[int]) -> bytes:
        return plan.encode(_summed(index, boxes, chunks))

    return _write(storage, base, index, pack, finish, effort, lambda: False)


def _pack(index: PackIndex, offsets: array[int], addresses: array[int], sizes: array[int], image: int) -> Pack:
    return Pack(
        offsets,
        addresses,
        sizes,
        index.payload_bytes,
        index.chunk_bytes,
        index.image_bytes,
        shard_index(index.payload_bytes, index.chunk_bytes),
        image,
    )


def _without(sealed: PackIndex, found: Split) -> PackIndex:
    """The index of a pack that has the changed boxes alone, and refers to the others."""
    boxes, end = [], 0
    for number in found.changed:
        boxes.append(msgspec.structs.replace(sealed.boxes[number], offset=end))
        end += align(sealed.boxes[number].nbytes)
    payload_bytes, chunk_bytes, _, image_bytes = image_of(end)
    return msgspec.structs.replace(
        sealed,
        payload_bytes=payload_bytes,
        chunk_bytes=chunk_bytes,
        image_bytes=image_bytes,
        boxes=tuple(boxes),
        references=found.references,
    )


def _has_frames(index: PackIndex) -> bool:
    """Whether any of the boxes is worth compressing."""
    return any(is_cut(box.shape, ITEM_BYTES[box.dtype], box.nbytes) for box in index.boxes)


def _summed(index: PackIndex, boxes: list[int], chunks: list[int]) -> PackIndex:
    return msgspec.structs.replace(index, box_crc32c=tuple(boxes), chunk_crc32c=tuple(chunks))


def _write(
    storage: Storage,
    base: str,
    index: PackIndex,
    pack: Pack,
    finish: Callable[[list[int], list[int]], bytes],
    effort: Effort,
    should_stop: Callable[[], bool],
) -> PackRecord:
    path = pack_path(index.rank)
    storage.create(f"{base}/{path}/zarr.json", pack_metadata(index.payload_bytes, index.chunk_bytes))
    boxes, chunks = storage.write_pack(f"{base}/{data_path(path)}", pack, effort, should_stop=should_stop)
    return _write_index(storage, base, index, finish(boxes, chunks))


def _write_encoded(
    storage: Storage,
    base: str,
    index: PackIndex,
    addresses: Sequence[int],
    codec: Codec,
    effort: Effort,
    should_stop: Callable[[], bool],
) -> PackRecord:
    from ftrain.checkpoint.writing.encoded_pack import EncodedPack  # numpy: who compresses nothing does not wait for it

    path, pack = pack_path(index.rank), EncodedPack(index, addresses, codec, effort)
    storage.write_stream(f"{base}/{data_path(path)}", pack, effort, should_stop=should_stop)
    done = pack.index
    storage.create(f"{base}/{path}/zarr.json", pack_metadata(done.payload_bytes, done.chunk_bytes))
    return _write_index(storage, base, done, encode_index(done))


def _write_index(storage: Storage, base: str, index: PackIndex, encoded: bytes) -> PackRecord:
    storage.create(f"{base}/{index_path(index.rank)}", encoded)
    return PackRecord(
        rank=index.rank,
        path=pack_path(index.rank),
        index_path=index_path(index.rank),
        index_sha256=hashlib.sha256(encoded).hexdigest(),
        payload_bytes=sum(box.nbytes for box in index.boxes),
        file_bytes=index.image_bytes,
        tensors=len(index.boxes),
        refers=tuple(reference.attempt for reference in index.references),
    )
