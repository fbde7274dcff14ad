"""From prepared packs to a manifest: the last thing written before the journal makes a checkpoint of an attempt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ftrain import __version__
from ftrain.core.manifest import (
    FORMAT,
    MANIFEST_PATH,
    REFERENCES_PATH,
    Manifest,
    PackIndex,
    check_coverage,
    data_path,
    decode_index,
    decode_manifest,
    encode_manifest,
)
from ftrain.core.messages import Attempt, PackRecord
from ftrain.errors import AlreadyExists, CorruptCheckpoint, StorageError, UnknownOutcome
from ftrain.storage.base import Storage
from ftrain.storage.zarr_view import references


def publish(storage: Storage, attempt: Attempt, world_size: int, packs: Sequence[PackRecord], writer: str) -> str:
    """Check every pack, write `refs.json`, then `manifest.json`, both durably; return the manifest's sha256.

    May be called again after a lost reply: with the same arguments it writes the same bytes, and finds its own
    work. Raises `CorruptCheckpoint` where the packs are not one whole state, and `StorageError` where another
    writer was here.
    """
    manifest = make_manifest(attempt, world_size, packs, writer)
    indexes = [read_index(storage, attempt.path, manifest, pack) for pack in manifest.packs]
    check_coverage(indexes, attempt.path)
    publish_references(storage, attempt.path, references(indexes))
    return publish_manifest(storage, attempt.path, manifest)


def make_manifest(attempt: Attempt, world_size: int, packs: Sequence[PackRecord], writer: str) -> Manifest:
    """Raises `CorruptCheckpoint` where the packs are not one for each rank."""
    ordered = tuple(sorted(packs, key=lambda pack: pack.rank))
    manifest = Manifest(FORMAT, __version__, attempt, world_size, writer, ordered)
    decode_manifest(encode_manifest(manifest), MANIFEST_PATH)  # what would not be read must not be written
    return manifest


def publish_references(storage: Storage, base: str, encoded: bytes) -> None:
    """The reference view, durably, below `base`: before the manifest, since after it nothing may be missing."""
    _create_once(storage, f"{base}/{REFERENCES_PATH}", encoded)


def publish_manifest(storage: Storage, base: str, manifest: Manifest) -> str:
    """The manifest, durably, when all that it names is there. Returns its sha256."""
    encoded = encode_manifest(manifest)
    _create_once(storage, f"{base}/{MANIFEST_PATH}", encoded)
    return hashlib.sha256(encoded).hexdigest()


def read_index(storage: Storage, base: str, manifest: Manifest, pack: PackRecord) -> PackIndex:
    """The index of one of the manifest's packs below `base`, proved by its digest; its pack has the right size.

    Raises `CorruptCheckpoint`, or `NotFound` where a file is gone.
    """
    path = f"{base}/{pack.index_path}"
    data = storage.read(path)
    if hashlib.sha256(data).hexdigest() != pack.index_sha256:
        raise CorruptCheckpoint(f"{path}: the pack index of rank {pack.rank} does not match its sha256")
    index = decode_index(data, path)
    if (index.rank, index.attempt, index.world_size) != (pack.rank, manifest.attempt, manifest.world_size):
        raise CorruptCheckpoint(f"{path}: is of rank {index.rank} of {index.world_size}, {index.attempt}")
    file = f"{base}/{data_path(pack.path)}"
    size = storage.size(file)
    if not size == pack.file_bytes == index.image_bytes:
        raise CorruptCheckpoint(f"{file}: the pack of rank {pack.rank} has {size} bytes instead of {pack.file_bytes}")
    return index


def _create_once(storage: Storage, path: str, data: bytes) -> None:
    try:
        storage.create(path, data)
    except (AlreadyExists, UnknownOutcome):
        if not storage.confirm(path, data):
            raise StorageError(
                f"{storage.url}/{path} does not hold what was to be written; is another coordinator at work?"
            ) from None
