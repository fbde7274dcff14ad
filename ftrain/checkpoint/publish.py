"""From prepared packs to a manifest: the last thing written before the journal makes a checkpoint of an attempt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from ftrain import __version__
from ftrain.checkpoint.written import format_of, read_packs
from ftrain.core.manifest import (
    FORMAT,
    MANIFEST_PATH,
    REFERENCES_PATH,
    Manifest,
    check_coverage,
    decode_manifest,
    encode_manifest,
)
from ftrain.core.messages import Attempt, PackRecord
from ftrain.errors import StorageError
from ftrain.storage.base import Storage, create_once
from ftrain.storage.zarr_view import references


def publish(
    storage: Storage, attempt: Attempt, world_size: int, packs: Sequence[PackRecord], writer: str, base: str = ""
) -> str:
    """Check every pack, write `refs.json`, then `manifest.json`, both durably; return the manifest's sha256.

    They are below `base`, or where a run has the attempt.

    May be called again after a lost reply: with the same arguments it writes the same bytes, and finds its own
    work. Raises `CorruptCheckpoint` where the packs are not one whole state, and `StorageError` where another
    writer was here.
    """
    base = base or attempt.path
    manifest = make_manifest(attempt, world_size, packs, writer)
    written = read_packs(storage, base, manifest)
    indexes = [one.index for one in written]
    check_coverage(indexes, base)
    publish_references(storage, base, references(indexes))
    return publish_manifest(storage, base, msgspec.structs.replace(manifest, format=format_of(written)))


def make_manifest(attempt: Attempt, world_size: int, packs: Sequence[PackRecord], writer: str) -> Manifest:
    """Raises `CorruptCheckpoint` where the packs are not one for each rank."""
    ordered = tuple(sorted(packs, key=lambda pack: pack.rank))
    manifest = Manifest(FORMAT, __version__, attempt, world_size, writer, ordered)
    decode_manifest(encode_manifest(manifest), MANIFEST_PATH)  # what would not be read must not be written
    return manifest


def publish_references(storage: Storage, base: str, encoded: bytes) -> None:
    """The reference view, durably, below `base`: before the manifest, since after it nothing may be missing."""
    _create(storage, f"{base}/{REFERENCES_PATH}", encoded)


def publish_manifest(storage: Storage, base: str, manifest: Manifest) -> str:
    """The manifest, durably, when all that it names is there. Returns its sha256."""
    encoded = encode_manifest(manifest)
    _create(storage, f"{base}/{MANIFEST_PATH}", encoded)
    return hashlib.sha256(encoded).hexdigest()


def _create(storage: Storage, path: str, data: bytes) -> None:
    if not create_once(storage, path, data):
        raise StorageError(
            f"{storage.url}/{path} does not hold what was to be written; is another coordinator at work?"
        )
