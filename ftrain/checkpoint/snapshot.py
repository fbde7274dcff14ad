"""One rank's part of a consistent capture: plan once with all ranks, then copy to the arena at armed boundaries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ftrain.checkpoint.exchange import encode_plain, encode_specs, exchange_specs
from ftrain.checkpoint.staging.arena import Arena, with_slack
from ftrain.checkpoint.staging.stage import StagePlan, Stager, Staging
from ftrain.checkpoint.state.items import TensorItem, written_of
from ftrain.checkpoint.writing.agreement import refuse_twice
from ftrain.checkpoint.writing.pack_plan import CleanSlots, PackPlan
from ftrain.core.layout import TensorSpec, describe, image_of, whole
from ftrain.core.messages import Attempt
from ftrain.core.node_state import SLOTS_MIN
from ftrain.core.write_plan import WriteItem, has_only_replicas, write_plan
from ftrain.errors import MismatchedState, OutOfMemory, ProtocolError

log = logging.getLogger("ftrain.snapshot")
PRIVATE_SLACK_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class _Ready:
    """What was worked out for some items."""

    items: Sequence[TensorItem]
    pack: PackPlan
    stage: StagePlan
    locals: list[torch.Tensor]  # of which the pack's boxes are all or a part

    def tensors(self) -> list[torch.Tensor]:
        """What the pack's boxes hold, wherever that lies by now."""
        if not self.pack.has_parts:
            return self.locals
        return [written_of(write, local) for write, local in zip(self.pack.writes, self.locals, strict=True)]


class Snapshotter:
    """Fills slots of this rank's arena. `exchange` gives every rank the bytes that each gave, by rank: a collective.

    `bytes_max` bounds the arena (0: by the host's memory only); `slots` is how many it is to have where some of the
    state is held by one rank only; `threads` copy at a time.
    """

    def __init__(
        self,
        arena: Arena,
        rank: int,
        world_size: int,
        exchange: Callable[[bytes], list[bytes]],
        bytes_max: int,
        slots: int = SLOTS_MIN,
        threads: int = 1,
    ) -> None:
        self._arena = arena
        self._rank = rank
        self._world_size = world_size
        self._exchange = exchange
        self._bytes_max = bytes_max
        self._slots_wanted = slots
        self._stager = Stager(threads)
        self._shared: Mapping[str, TensorSpec] | None = None
        self._written: tuple[WriteItem, ...] = ()
        self._ready: _Ready | None = None
        self._slots = CleanSlots(arena)
        self._room = (0, 0)  # for an image and for an index, in bytes
        self._has_own = False  # of some of the state there is nothing on any other rank

    def plan(self, items: Sequence[TensorItem], plain: Mapping[str, object] | None = None) -> None:
        """`agree`, and make ready to `take`."""
        self.agree(items, plain)
        self.reserve()
        self.pin()

    def agree(self, items: Sequence[TensorItem], plain: Mapping[str, object] | None = None) -> None:
        """Agree with all ranks on who writes what. A collective: all ranks call it together.

        To be called again when tensors that ranks share came, went or changed shape. Raises `MismatchedState` on
        every rank where ranks disagree; `NotPlainData` as it applies here.
        """
        specs = [item.spec for item in items if not item.spec.private]
        refuse_twice([item.spec for item in items])
        everybody = exchange_specs(specs, encode_specs(specs), self._exchange, self._rank)[0]
        self._written = write_plan(everybody)[self._rank]
        self._shared = {spec.key: spec for spec in specs}
        self._ready = None
        pack = self._prepare(items).pack
        index = pack.encode(pack.index(Attempt(0, 0, 0), encode_plain(plain or {})))
        private = sum(write.nbytes for write in pack.writes if write.spec.private)
        image_bytes = image_of(pack.layout.payload_bytes + private // 4 + PRIVATE_SLACK_BYTES)[-1]
        self._room = (image_bytes, with_slack(len(index)))
        self._has_own = not has_only_replicas(everybody)

    def reserve(self) -> None:
        """Have memory for what was agreed on, in any thread while nothing is taken. Raises `OutOfMemory`.

        It takes as long as the host needs to give that much memory, which is seconds where there is much of it.
        """
        self._arena.reserve(SLOTS_MIN, *self._room, self._bytes_max)
        self._reserve_more()

    def pin(self) -> None:
        """Let devices copy to what was reserved."""
        assert self._ready is not None, "agree comes first"
        images = [self._arena.image(slot) for slot in range(self._arena.slots)]
        if hindrance := self._stager.pin(images, [item.local for item in self._ready.items]):
            log.warning("snapshots of what is on the GPU are slower than they could be: %s", hindrance)

    def take(
        self, slot: int, attempt: Attempt, items: Sequence[TensorItem], plain: Mapping[str, object]
    ) -> Callable[[], Staging]:
        """Begin to copy what this rank writes into `slot`. Local: no other rank is waited for.

        Returns what has to be called, in any thread and before the next `take`: it waits for the copies, seals the
        slot, and gives what became of them. Private tensors and plain data may differ from one time to the next, in
        number and size; `items` is the same object where nothing did. Raises `MismatchedState`, now or when that is
        called, when shared tensors are not those of `plan` or changed under the copy; then, as after any other error,
        the slot is not sealed.
        """
        ready = self._prepare(items)
        index = ready.pack.encode(ready.pack.index(attempt, encode_plain(plain)))
        if slot >= self._arena.slots:
            raise ProtocolError(f"slot {slot} was asked for, but the arena has {self._arena.slots}")
        self._arena.grow(slot, ready.pack.layout.image_bytes, len(index), self._bytes_max)
        self._arena.clear_index(slot)
        staging = self._stager.begin(ready.stage, ready.tensors(), self._slots.image(slot, ready.pack))

        def finish() -> Staging:
            staging.finish()
            self._arena.write_index(slot, index)
            return staging

        return finish

    @property
    def slots(self) -> int:
        """How many snapshots the arena has memory for."""
        return self._arena.slots

    @property
    def has_slots(self) -> bool:
        """Whether the arena has as many as `reserve` wants, from this process or the one before it."""
        return self._arena.slots >= self._slots_due

    @property
    def _slots_due(self) -> int:
        return self._slots_wanted if self._has_own else SLOTS_MIN

    def _reserve_more(self) -> None:
        try:
            for slots in range(SLOTS_MIN + 1, self._slots_due + 1):
                self._arena.reserve(slots, *self._room, self._bytes_max)
        except OutOfMemory as error:
            log.warning("snapshots in memory are less frequent than they could be: no slot more, %s", error)

    def _prepare(self, items: Sequence[TensorItem]) -> _Ready:
        """What to write and what to copy for these items: made anew only where they are not those of last time."""
        if self._ready is not None and self._ready.items is items:
            return self._ready
        self._check_unchanged(items)
        own = (WriteItem(item.spec, whole(item.spec.shape), item.spec.nbytes) for item in items if item.spec.private)
        pack = PackPlan(self._rank, self._world_size, (*self._written, *own))
        by_name = {(item.spec.key, item.spec.private): item for item in items}
        written = [by_name[write.spec.key, write.spec.private] for write in pack.writes]
        plan = StagePlan([item.spec.key for item in written], pack.offsets, [item.late for item in written])
        self._ready = _Ready(items, pack, plan, [item.local for item in written])
        return self._ready

    def _check_unchanged(self, items: Sequence[TensorItem]) -> None:
        refuse_twice([item.spec for item in items])
        planned = self._shared
        if planned is None:
            raise ProtocolError("a snapshot was asked for before it was planned")
        now = {item.spec.key: item.spec for item in items if not item.spec.private}
        if now == planned:
            return
        gone = [f"{key} is gone" for key in planned if key not in now]
        new = [f"{key} is new" for key in now if key not in planned]
        other = [
            f"{key} was {describe(planned[key])} and is {describe(spec)}"
            for key, spec in now.items()
            if key in planned and planned[key] != spec
        ]
        raise MismatchedState(
            f"the tracked tensors changed since they were planned: {'; '.join((gone + new + other)[:5])}"
        )
