"""What a run tracks, or what is saved at a time, as tensors and plain data, and back.

Parameters and optimizer state are shared: replicated or sharded as their DTensor says, written once. So are the
tensors of dicts. A buffer that this rank has changed since it was tracked is saved for this rank as well. Everything
else belongs to its rank. docs/format.md has the keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ftrain.checkpoint.exchange import Exchange, asked_by_others
from ftrain.checkpoint.state.items import TensorItem
from ftrain.checkpoint.state.mapping_state import MappingState
from ftrain.checkpoint.state.module_state import ModuleState
from ftrain.checkpoint.state.object_state import ObjectState, Stateful
from ftrain.checkpoint.state.optimizer_state import OptimizerState
from ftrain.checkpoint.state.part import OwnSource, Part, Saved, Source
from ftrain.checkpoint.state.plains import Plains
from ftrain.checkpoint.state.source import Held
from ftrain.checkpoint.state.terms import EVERYTHING, Terms
from ftrain.core import plain as plain_data
from ftrain.errors import MismatchedState, UsageError

REST = ""  # the name of what has none of its own: tensors and plain data on top of a state


class Tracked:
    """Objects by name."""

    def __init__(self) -> None:
        self._objects: dict[str, Source] = {}
        self._items: list[TensorItem] | None = None  # of the last `collect`
        self._lenders: dict[str, int] = {}  # of names that this rank's own part of a checkpoint has not, which rank has
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

    def restore(self, checkpoint: Held, rank: int, source: int, exchange: Exchange | None = None) -> None:
        """Put the state of a checkpoint back, in place. `source` is the rank whose private state this rank takes.

        With `exchange` all ranks restore together, and each may ask for a part of the state: stages of a pipeline.
        """
        items = self.prepare(checkpoint, source)
        elsewhere: Collection[str] = ()
        if exchange is not None:
            asked = {item.spec.key for item in items if not item.spec.private}
            elsewhere = asked_by_others(checkpoint.tensors.keys() - asked, asked, exchange)
        self.fill(checkpoint, rank, source, items, elsewhere)

    @contextmanager
    def own_options(self) -> Iterator[None]:
        """Whatever is restored in here: optimizers keep their options, and schedulers what they count from."""
        put_back = [one.keep_options() for one in self._objects.values() if isinstance(one, OptimizerState)]
        objects = [one.found for one in self._objects.values() if isinstance(one, ObjectState)]
        bases = [(found, list(found.base_lrs)) for found in objects if isinstance(found, LRScheduler)]
        yield
        for put in put_back:
            put()
        for scheduler, base_lrs in bases:
            scheduler.base_lrs = base_lrs

    def restore_modules(self, checkpoint: Held, rank: int) -> None:
        """Put back the modules of a checkpoint alone: a run that is forked to be trained in another way.

        Buffers are as rank 0 had them. Raises `MismatchedState` where one is not there, or is another one.
        """
        modules = Tracked()
        modules._objects = {name: one for name, one in self._objects.items() if isinstance(one, ModuleState)}
        modules.fill(checkpoint, rank, 0, modules.prepare(checkpoint, 0), checkpoint.tensors.keys())

    def prepare(
        self, checkpoint: Held, source: int, terms: Terms = EVERYTHING, missing: list[str] | None = None
    ) -> list[TensorItem]:
        """The tensors to be filled from a checkpoint, and all else made ready that `fill` takes over.

        What the checkpoint lacks besides tensors goes to `missing`. Without that list this raises `MismatchedState`, as
        it does where the checkpoint has nothing under a name and `terms` are strict.
        """
        private = checkpoint.private_tensors(source)
        plains = Plains(checkpoint, source, terms)
        lacking: list[str] = []
        self._lenders = {}
        items: list[TensorItem] = []
        for name, one in self._objects.items():
            found = plains.find(name)
            if found is None and terms.wants_object(name) and not plains.has_tensors(name):
                if terms.strict:
                    raise MismatchedState(plains.nothing(name))
                lacking.append(name)
                continue
            own = private
            if found is not None and found.rank != source:
                self._lenders[name] = found.rank
                own = checkpoint.private_tensors(found.rank)
            others = partial(plains.others, name)
            saved = Saved(checkpoint.tensors, own, found.name if found else "", terms, others, lacking)
            items += one.prepare(found.plain if found else None, saved)
        if missing is not None:
            missing += lacking
        elif lacking:
            raise MismatchedState(f"the checkpoint lacks {', '.join(lacking[:5])}: it is of another model or optimizer")
        return items

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
        by_lender: dict[int, list[TensorItem]] = {}
        for item in own:
            by_lender.setdefault(self._lender(item.spec.key, source), []).append(item)
        for lender, lent in by_lender.items():
            # What the rank kept for itself wins over what all share.
            checkpoint.read_into(lent, lender, elsewhere=checkpoint.tensors.keys())
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
    def holders(self) -> list[str]:
        """The names of what holds tensors of its own: modules, and dicts and lists of tensors."""
        return [
            name
            for name, one in self._objects.items()
            if isinstance(one, ModuleState) or (isinstance(one, MappingState) and one.has_tensors)
        ]

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

    def _lender(self, key: str, source: int) -> int:
        """The rank whose private tensor this rank takes."""
        found = (rank for name, rank in self._lenders.items() if key.startswith(f"{name}."))
        return next(found, source)

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
