"""A state that is to be saved, as tensors and plain data."""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftrain import _native
from ftrain.checkpoint.exchange import encode_plain
from ftrain.checkpoint.garbage import no_collection
from ftrain.checkpoint.staging.look import MANY, is_unchanged, quick_look, recall
from ftrain.checkpoint.state.items import written_of
from ftrain.checkpoint.state.tracked import Tracked
from ftrain.checkpoint.writing.pack_plan import PackPlan
from ftrain.core.layout import TensorSpec

State = MutableMapping[str, Any]
PLAIN_DICTS = (dict, OrderedDict)


@dataclass(frozen=True, slots=True)
class Job:
    """A state as it is when it is saved. `late` and `tensors` are in the order of `specs`; `plain` is encoded."""

    specs: list[TensorSpec]
    late: list[bool]
    tensors: list[torch.Tensor]
    plain: dict[str, Any]
    seen: _native.Look | None = None  # a look at the tensors, where there was one
    versions: bytes | None = None  # of the tensors, where they were recalled: to be looked at before they are copied

    def written(self, pack: PackPlan) -> list[torch.Tensor]:
        """What the pack's boxes hold, in their order."""
        if self.writes_all(pack):
            return self.tensors
        held = zip(self._places(pack), pack.writes, strict=True)
        return [written_of(write, self.tensors[place]) for place, write in held]

    def written_late(self, pack: PackPlan) -> list[bool]:
        return self.late if self.writes_all(pack) else [self.late[place] for place in self._places(pack)]

    def writes_all(self, pack: PackPlan) -> bool:
        """Whether the pack's boxes are all of the job's tensors, and in their order."""
        return len(pack.writes) == len(self.specs) and not pack.has_parts

    def _places(self, pack: PackPlan) -> list[int]:
        by_name = {(spec.key, spec.private): place for place, spec in enumerate(self.specs)}
        return [by_name[write.spec.key, write.spec.private] for write in pack.writes]


class Jobs:
    """Makes jobs of states, and remembers the last one that held nothing but plain tensors: usually it is the next one.

    Of such a state only the names and the places of its tensors have to be looked at again.
    """

    def __init__(self) -> None:
        self._known: _Known | None = None

    def job(self, state: State) -> Job:
        """The job of saving the state as it is now. Raises `UsageError` where it cannot be saved, naming the key."""
        known = self._known
        recalled = None if known is None else known.recall(state)
        if known is not None and recalled is not None:
            tensors, counted = recalled
            return Job(known.specs, known.late, tensors, known.plain, versions=counted)
        leaves = _leaves(state)
        if leaves is None:
            return _job(state)
        seen = quick_look(leaves.tensors, known.seen if known is not None else None)
        if seen is None:
            return _job(state)
        if known is not None and leaves.is_named_as(known.leaves) and is_unchanged(leaves.tensors, seen, known.seen):
            return Job(known.specs, known.late, leaves.tensors, known.plain, seen)
        job = _job(state)
        if leaves.has_plain_names() and len(job.tensors) == len(leaves.tensors):
            is_same_list = known is not None and known.specs == job.specs
            specs = known.specs if known is not None and is_same_list else job.specs  # whoever knows it asks no further
            self._known = _Known(_Leaves(leaves.names, leaves.sizes, leaves.keys, []), seen, specs, job.late, job.plain)
        return job

    def forget(self) -> None:
        """The next state is looked at as the first one was."""
        self._known = None


@dataclass(frozen=True, slots=True)
class _Leaves:
    """The tensors of a dict of tensors, or of a dict of such dicts, of which `names` and `sizes` then tell."""

    names: list[Any]
    sizes: list[int]
    keys: list[Any]
    tensors: list[torch.Tensor]

    def is_named_as(self, other: _Leaves) -> bool:
        return self.sizes == other.sizes and _are_same(self.names, other.names) and _are_same(self.keys, other.keys)

    def has_plain_names(self) -> bool:
        return set(map(type, itertools.chain(self.names, self.keys))) <= {str}


@dataclass(frozen=True, slots=True)
class _Known:
    leaves: _Leaves  # without the tensors: they are the user's to let go
    seen: _native.Look
    specs: list[TensorSpec]
    late: list[bool]
    plain: dict[str, Any]

    def recall(self, state: State) -> tuple[list[torch.Tensor], bytes] | None:
        """The tensors of a state of very many, and their versions, where it is the known one; None to look closer."""
        if len(self.leaves.keys) < MANY:
            return None
        if not self.leaves.names:
            return recall(self.seen, [state], self.leaves.keys) if isinstance(state, PLAIN_DICTS) else None
        values = list(state.values())
        if list(state) != self.leaves.names or not all(type(value) in PLAIN_DICTS for value in values):
            return None
        if [len(value) for value in values] != self.leaves.sizes:
            return None
        return recall(self.seen, values, self.leaves.keys)


def _leaves(state: State) -> _Leaves | None:
    """None for a state of another kind; what the values are besides dicts is for a look to find out."""
    values = list(state.values())
    if not values or isinstance(values[0], torch.Tensor):
        return _Leaves([], [], list(state), values)
    if not all(type(value) in PLAIN_DICTS for value in values):
        return None
    keys: list[Any] = []
    tensors: list[torch.Tensor] = []
    for value in values:
        keys += value
        tensors += value.values()
    return _Leaves(list(state), [len(value) for value in values], keys, tensors)


def _are_same(names: Sequence[Any], known: Sequence[Any]) -> bool:
    """Whether these are the known names, all of them strings. The same objects, as a rule, so that is asked first."""
    if len(names) != len(known):
        return False
    return all(map(operator.is_, names, known)) or (set(map(type, names)) == {str} and names == known)


def _job(state: State) -> Job:
    tracked = Tracked()
    tracked.add_state(state)
    with no_collection():
        part = tracked.collect()
    items = part.items
    plain = encode_plain({"tracked": part.plain})
    return Job([item.spec for item in items], [item.late for item in items], [item.local for item in items], plain)
