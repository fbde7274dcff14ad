"""What a run tracks, or what is saved at a time, as tensors and plain data, and back.

Parameters and optimizer state are shared: replicated or sharded as their DTensor says, written once. So are the
tensors of dicts. A buffer that this rank has changed since it was tracked is saved for this rank as well. Everything
else belongs to its rank. docs/format.md has the keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ftrain.checkpoint.items import TensorItem
from ftrain.checkpoint.mapping_state import MappingState
from ftrain.checkpoint.module_state import ModuleState
from ftrain.checkpoint.object_state import ObjectState, Stateful
from ftrain.checkpoint.optimizer_state import OptimizerState
from ftrain.checkpoint.part import OwnSource, Part, Saved, Source
from ftrain.checkpoint.restore import Held
from ftrain.core import plain as plain_data
from ftrain.errors import MismatchedState, UsageError

REST = ""  # the name of what has none of its own: tensors and plain data on top of a state


class Tracked:
    """Objects by name."""

    def __init__(self) -> None:
        self._objects: dict[str, Source] = {}
        self._items: list[TensorItem] | None = None  # of the last `collect`
        self._rests: list[tuple[MutableMapping[str, Any], dict[str, Any]]] = []  # states, and what of them is in REST

    def add(self, name: str, found: object) -> None:
        """Raises `UsageError` for a name that is taken or not one, and for an object without state; `NotPlainData`."""
        if name in self._objects:
            raise UsageError(f"track({name}=…): something is tracked under this name already")
        if not name.isidentifier():
            raise UsageError(f"track({name!r}): a name has letters, digits and underscores only")
        if not isinstance(found, Stateful):
            raise UsageError(
                f"track({name}=…): a {type(found).__name__} has no state_dict and load_state_dict; "
                "give a module, an optimizer, or an object that has both"
            )
        self._objects[name] = self._source(name, found)

    def add_state(self, state: MutableMapping[Any, Any]) -> None:
        """Add everything in a state: objects as `add` does, dicts of tensors, tensors and plain data.

        Raises `UsageError` for names that are not strings.
        """
        rest: dict[str, Any] = {}
        for name, found in state.items():
            if not isinstance(name, str) or not name:
                raise UsageError(f"a state has strings for names, not {name!r}")
            if isinstance(found, torch.Tensor):  # first: asking a tensor for methods takes long, and there may be many
                rest[name] = found
            elif isinstance(found, Stateful):
                self._objects[name] = self._source(name, found)
            elif isinstance(found, MutableMapping):
                self._objects[name] = MappingState(name, found)
            else:
                rest[name] = found
        if rest:
            self._objects[REST] = MappingState("", rest)
            self._rests.append((state, rest))

    def check(self) -> None:
        """Find out now what could not be saved later. Raises `NotPlainData` or `UsageError` naming the key."""
        for name, one in self._objects.items():
            plain_data.encode(one.part().plain, name)

    def collect(self) -> Part:
        """Everything as it is now. `items` is the same object as last time where all tensors are the same."""
        if self._items is not None:
            plain: dict[str, object] = {}
            for name, one in self._objects.items():
                now = one.plain_if_same()
                if now is None:
                    break
                plain[name] = now
            else:
                return Part(self._items, plain)
        whole = Part()
        for name, one in self._objects.items():
            part = one.part()
            whole.items += part.items
            whole.plain[name] = part.plain
        self._items = whole.items
        return whole

    def restore(self, checkpoint: Held, rank: int, source: int) -> None:
        """Put the state of a checkpoint back, in place. `source` is the rank whose private state this rank takes."""
        self.fill(checkpoint, rank, source, self.prepare(checkpoint, source))

    def prepare(self, checkpoint: Held, source: int) -> list[TensorItem]:
        """The tensors to be filled from a checkpoint. Raises `MismatchedState` where it has nothing under a name."""
        plain: Any = checkpoint.plain(source)["tracked"]
        for name in self._objects:
            if name not in plain:
                named = f"tracked as {name!r}" if name else "that is no object's or dict's"
                raise MismatchedState(f"the checkpoint has nothing {named}: it has {', '.join(sorted(plain))}")
        saved = Saved(checkpoint.tensors, checkpoint.private_tensors(source))
        return [item for name, one in self._objects.items() for item in one.prepare(plain[name], saved)]

    def fill(
        self,
        checkpoint: Held,
        rank: int,
        source: int,
        items: Sequence[TensorItem],
        elsewhere: Collection[str] = (),
    ) -> None:
        """Fill what `prepare` gave, and take over the rest. `elsewhere` are keys that are not to be missed here."""
        shared = [item for item in items if not item.spec.private]
        own = [item for item in items if item.spec.private]
        checkpoint.read_into(shared, rank, elsewhere=elsewhere)
        if own:
            # What the rank kept for itself wins over what all share.
            checkpoint.read_into(own, source, elsewhere=[*elsewhere, *(item.spec.key for item in shared)])
        for one in self._objects.values():
            one.finish()
        for state, rest in self._rests:
            state.update(rest)

    def own(self) -> Part:
        """What is this rank's alone, as it is now: plain data by name, private tensors, and tensors to be watched.

        Quick, for every boundary: `OwnSource.own` says more.
        """
        whole = Part()
        for name, one in self._own_sources():
            part = one.own()
            whole.items += part.items
            whole.plain[name] = part.plain
        return whole

    def take_back(self, plain: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `own` gave: plain data by name, and private tensors by key. Raises `MismatchedState`."""
        sources = dict(self._own_sources())
        if sources.keys() != plain.keys():
            raise MismatchedState(
                f"at that boundary {', '.join(sorted(plain)) or 'nothing'} was tracked, and now "
                f"{', '.join(sorted(sources)) or 'nothing'} is"
            )
        for name, one in sources.items():
            one.take_back(plain[name], {key: found for key, found in tensors.items() if key.startswith(f"{name}.")})

    def sizes(self) -> list[tuple[int, int]]:
        """Of the optimizers' states. Where they are the same, the tensors that ranks share are usually the same."""
        return [one.size for one in self._objects.values() if isinstance(one, OptimizerState)]

    @property
    def names(self) -> set[str]:
        return set(self._objects)

    @property
    def modules(self) -> list[nn.Module]:
        return [one.module for one in self._objects.values() if isinstance(one, ModuleState)]

    @property
    def replays(self) -> bool:
        """Whether a step done again, with any parameters, leaves a rank's own state as the step itself left it."""
        return all(
            not isinstance(one, ObjectState) or isinstance(one.found, LRScheduler) for one in self._objects.values()
        )

    @property
    def rebuilds_buckets(self) -> bool:
        """Whether a module is replicated by DDP, which lays its buckets out anew after its first iteration."""
        return any(isinstance(one, ModuleState) and one.replicated for one in self._objects.values())

    def parameters(self) -> dict[int, str]:
        """Parameter name by object, over all tracked modules."""
        return {
            id(tensor): f"{name}.{key}"
            for name, one in self._objects.items()
            if isinstance(one, ModuleState)
            for key, tensor in one.tensors()
        }

    def _own_sources(self) -> Iterator[tuple[str, OwnSource]]:
        for name, one in self._objects.items():
            if isinstance(one, ModuleState | OptimizerState | ObjectState):
                yield name, one

    def _source(self, name: str, found: Stateful) -> Source:
        if isinstance(found, nn.Module):
            if any(isinstance(one, FullyShardedDataParallel) for one in found.modules()):
                raise UsageError(f"{name}: FullyShardedDataParallel is not supported; use fully_shard (FSDP2)")
            return ModuleState(name, found)
        if isinstance(found, Optimizer):
            return OptimizerState(name, found, self.parameters)
        return ObjectState(name, found)
