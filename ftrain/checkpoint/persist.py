"""From a sealed slot of the arena to a durable pack. Runs in the agent, in a thread; knows nothing of torch."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable

import msgspec

from ftrain import _native
from ftrain.checkpoint.arena import Arena
from ftrain.core.manifest import PackIndex, data_path, decode_index, encode_index, index_path, pack_path
from ftrain.core.messages import Attempt, PackRecord
from ftrain.errors import CorruptCheckpoint
from ftrain.storage.base import Storage
from ftrain.storage.zarr_view import pack_metadata, shard_index


def persist(
    storage: Storage, attempt: Attempt, rank: int, arena: Arena, slot: int, should_stop: Callable[[], bool]
) -> PackRecord:
    """Write the pack that `slot` holds, and its index, durably: once this returned, the rank is prepared.

    The slot must stay sealed meanwhile. Raises `CorruptCheckpoint` where it holds something else, and
    `StorageError` where storage fails, or soon after `should_stop` answered True. What was written until then is
    garbage that `retain` removes.
    """
    arena.attach()
    where = f"the snapshot of rank {rank} in slot {slot} of its arena"
    sealed = decode_index(arena.read_index(slot), where, sealed=True)
    image = arena.image(slot)
    if (sealed.attempt, sealed.rank) != (attempt, rank) or sealed.image_bytes > image.nbytes:
        raise CorruptCheckpoint(f"{where} is of rank {sealed.rank}, {sealed.attempt}, instead of {attempt}")
    index = _checksummed(sealed, image.address)
    ending = shard_index(index.payload_bytes, index.chunk_bytes)
    ctypes.memmove(image.address + index.image_bytes - len(ending), ending, len(ending))

    base, pack, encoded = attempt.path, pack_path(rank), encode_index(index)
    storage.create(f"{base}/{pack}/zarr.json", pack_metadata(index.payload_bytes, index.chunk_bytes))
    storage.write_from(f"{base}/{data_path(pack)}", image.address, index.image_bytes, should_stop=should_stop)
    storage.create(f"{base}/{index_path(rank)}", encoded)
    return PackRecord(
        rank=rank,
        path=pack,
        index_path=index_path(rank),
        index_sha256=hashlib.sha256(encoded).hexdigest(),
        payload_bytes=sum(record.nbytes for record in index.boxes),
        file_bytes=index.image_bytes,
        tensors=len(index.boxes),
    )


def _checksummed(sealed: PackIndex, address: int) -> PackIndex:
    """The index with the checksum of every box and of every chunk of the image at `address`."""
    boxes = tuple(
        msgspec.structs.replace(record, crc32c=_native.crc32c_address(address + record.offset, record.nbytes))
        for record in sealed.boxes
    )
    chunks = tuple(_native.crc32c_chunks(address, sealed.payload_bytes, sealed.chunk_bytes))
    return msgspec.structs.replace(sealed, boxes=boxes, chunk_crc32c=chunks)
