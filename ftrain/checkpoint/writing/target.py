"""A directory that is to become one checkpoint.

It is committed once its manifest is there, which is written last; a directory without one is what a crash left of a
save, and the next save to that path removes it.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ftrain.checkpoint.peers import Peers, together
from ftrain.checkpoint.pins import KEPT, is_pin_name
from ftrain.checkpoint.publish import make_manifest, publish, publish_manifest, publish_references
from ftrain.checkpoint.writing.agreement import Agreed
from ftrain.checkpoint.writing.persist import persist_plan
from ftrain.core.codec import Codec
from ftrain.core.manifest import MANIFEST_PATH, REFERENCES_PATH
from ftrain.core.messages import Attempt, PackRecord
from ftrain.errors import AlreadyExists, MismatchedState, UsageError
from ftrain.storage import Opener
from ftrain.storage.base import Effort

WRITER = "save"
OURS = {"packs", REFERENCES_PATH}  # what a save that was cut off leaves


class _Saved(msgspec.Struct, frozen=True):
    """What each rank tells the others once its pack is written."""

    pack: PackRecord
    codec: str


_SAVED = msgspec.json.Decoder(_Saved)


class Target:
    """Where one checkpoint goes: `path`, or, with `keep`, that name below it. Raises `UsageError` where it cannot."""

    def __init__(
        self,
        path: str | Path,
        step: int,
        keep: str | None = None,
        compress: str | None = None,
        opener: Opener | None = None,
    ) -> None:
        self._codec = None if compress is None else _codec(compress)
        if step < 0:
            raise UsageError(f"step={step}: the number of a step cannot be negative")
        self._storage, self._base = (opener or Opener()).open(path if keep is None else _kept(path, keep))
        self._attempt = Attempt(1, step, 1)

    def __str__(self) -> str:
        return f"{self._storage.url}/{self._base}"

    def commit(
        self,
        agreed: Agreed,
        peers: Peers,
        find: Callable[[], array[int]],
        plain: Mapping[str, Any],
        effort: Effort,
        image: int = 0,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        """Write all packs, then the manifest. A collective: it is committed for all ranks, or fails on all of them.

        `find` gives the addresses of the pack's boxes, once they may be read there; `settle` raises where what was
        written is not to be committed. The rest is as in `persist_plan`.
        """
        with together(peers, f"preparing {self}"):
            addresses = find()
            if peers.rank == 0:
                self._prepare()
        records: list[bytes] = []
        with together(peers, f"writing {self}"):
            knows = peers.rank == 0 and self._codec is None  # where what is written will lie
            beside = _Beside(self._publish_references if knows else _nothing, agreed)
            try:
                record = persist_plan(
                    self._storage, self._base, self._attempt, agreed.pack, addresses, plain, effort, image, self._codec
                )
            finally:
                beside.join()
            beside.check()
            settle()
            records = [msgspec.json.encode(_Saved(record, str(self._codec)))]
        if peers.world_size > 1:
            records = peers.exchange(records[0])
        with together(peers, f"committing {self}"):
            if peers.rank == 0:
                self._publish([_SAVED.decode(one) for one in records])

    def _publish(self, saved: list[_Saved]) -> None:
        packs = [one.pack for one in saved]
        for one in saved:
            if one.codec != str(self._codec):
                raise MismatchedState(
                    f"rank 0 compresses with {self._codec}, rank {one.pack.rank} with {one.codec}: give save the same "
                    "compress on all ranks"
                )
        if self._codec is not None:
            publish(self._storage, self._attempt, len(packs), packs, WRITER, self._base)
            return
        manifest = make_manifest(self._attempt, len(packs), packs, WRITER)
        publish_manifest(self._storage, self._base, manifest)

    def _publish_references(self, agreed: Agreed) -> None:
        publish_references(self._storage, self._base, agreed.references)

    def _prepare(self) -> None:
        """Remove what a save left that did not get to its end. Raises `AlreadyExists`, `UsageError`."""
        there = self._storage.list(self._base)
        if MANIFEST_PATH in there:
            raise AlreadyExists(f"{self} holds a checkpoint already; remove it, or save to another path")
        strange = set(there) - OURS
        if strange:
            raise UsageError(f"{self} holds {min(strange)}, which is not ftrain's; save to a directory of its own")
        if there:
            self._storage.remove_tree(self._base)


def _kept(path: str | Path, name: str) -> str:
    if not is_pin_name(name):
        raise UsageError(f"keep={name!r}: a name has letters, digits, '_', '-' and '.', and begins with a letter")
    return f"{str(path).rstrip('/')}/{KEPT}/{name}"


def _codec(text: str) -> Codec:
    try:
        return Codec.parse(text)
    except ValueError as error:
        raise UsageError(f"compress={text!r}: {error}") from None


class _Beside(threading.Thread):
    """One call in a thread of its own: no pool, which would start none while the interpreter ends."""

    def __init__(self, call: Callable[[Agreed], None], agreed: Agreed) -> None:
        super().__init__(name="ftrain-save")
        self._call = call
        self._agreed = agreed
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call(self._agreed)
        except Exception as error:  # noqa: BLE001 - a thread's edge: `check` raises it
            self._error = error

    def check(self) -> None:
        if self._error is not None:
            raise self._error


def _nothing(agreed: Agreed) -> None:
    del agreed
