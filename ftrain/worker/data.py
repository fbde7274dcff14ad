"""An endless iterator over a loader whose position is part of the tracked state: each sample exactly once an epoch.

To resume, every random number generator goes back to where it was when the epoch began, the loader begins that epoch
again, and what was delivered is skipped: a DataLoader's sampler is drawn from without loading anything, another
loader's batches are drawn.

The position is kept in samples of the whole run, not in batches of one rank, so that it also holds in another world
size: with a `DistributedSampler`, after `k` batches of `b` samples on each of `w` ranks, the first `k·b·w` samples of
the epoch's order are done.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from ftrain.core import plain as plain_data
from ftrain.errors import MismatchedState, UsageError
from ftrain.worker import random_state


class Batches:
    """Goes through `loader` epoch after epoch. `epoch` and `position` are what `state` saves."""

    def __init__(self, loader: Iterable[Any], name: str, world_size: int) -> None:
        if isinstance(loader, Iterator):
            raise UsageError(f"{name}: an iterator can be gone through only once; give the loader itself")
        self._loader = loader
        self._name = name
        self._world_size = world_size
        self._epoch = 0
        self._delivered = 0  # batches of this epoch that this rank has handed out
        self._skip = 0  # batches of this epoch that were done before this process began
        self._samples = 0  # of this epoch, done by the whole run before this process began
        self._rng: dict[str, object] | None = None  # when this epoch began
        self._first_rng = self._now()
        self._own_rng = self._first_rng  # where the loader's own generators were when this epoch began
        self._iterator: Iterator[Any] | None = None
        self._own_state: Any = None

    @property
    def epoch(self) -> int:
        return self._epoch

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._begin()
        for _ in range(2):
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._epoch += 1
                self._delivered = self._skip = self._samples = 0
                self._rng = self._own_state = None
                self._iterator = self._begin()
            else:
                self._delivered += 1
                return batch
        raise UsageError(f"{self._name}: the loader gives no batches at all")

    def state(self) -> dict[str, object]:
        """Plain data. To be called at a step's boundary."""
        stateful = getattr(self._loader, "state_dict", None)
        return {
            "epoch": self._epoch,
            "batches": self._skip + self._delivered,
            "samples": self._samples + self._delivered * self._samples_per_batch(),
            "world_size": self._world_size,
            "rng": self._rng,
            "own_rng": self._own_rng,
            "loader": _without_tensors(stateful(), self._name) if stateful is not None else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after the batch that the state was saved after."""
        self._epoch = state["epoch"]
        self._own_state = state["loader"]
        self._rng, self._own_rng = state["rng"], state["own_rng"] or self._first_rng
        if len(self._own_rng) != len(self._generators()):
            raise MismatchedState(
                f"{self._name}: the loader had {len(self._own_rng)} random generators of its own, and now has "
                f"{len(self._generators())}; resume with the loader that the run began with"
            )
        for generator, saved in zip(self._generators(), self._own_rng, strict=True):
            random_state.set_generator(generator, saved)
        same = state["world_size"] == self._world_size
        # Where it is not a whole number for each rank, the few samples beyond are done again: none is left out.
        self._samples = state["samples"] // self._world_size * self._world_size
        self._skip = state["batches"] if same else self._samples // self._samples_per_batch()
        self._delivered = 0
        self._iterator = None

    def prepare(self) -> None:
        """Begin the resumed epoch now, with its own random numbers; the caller puts the present ones back."""
        if self._rng is not None:
            self._iterator = self._begin()

    def _begin(self) -> Iterator[Any]:
        if self._rng is not None:
            random_state.restore(self._rng)
        else:
            self._rng = random_state.capture()
            self._own_rng = self._now()
        for sampler in self._samplers():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self._epoch)
        if self._own_state is not None:
            self._loader.load_state_dict(_with_tensors(self._own_state))  # type: ignore[attr-defined]
            return iter(self._loader)
        if not self._skip and not self._samples:
            if getattr(self._loader, "_iterator", None) is not None:
                # A DataLoader whose processes last draws a base seed for them in its first epoch only. Drawn in each,
                # an epoch is the same whether or not it is the first of its process.
                torch.empty((), dtype=torch.int64).random_(generator=getattr(self._loader, "generator", None))
            return iter(self._loader)
        if isinstance(self._loader, DataLoader) and not isinstance(self._loader.dataset, IterableDataset):
            return self._resumed(self._loader)
        iterator = iter(self._loader)
        for done in range(self._skip):
            if next(iterator, _NOTHING) is _NOTHING:
                raise MismatchedState(
                    f"{self._name}: {self._skip} batches of epoch {self._epoch} were done, but the loader has only "
                    f"{done}; resume with the data that the run began with"
                )
        return iterator

    def _resumed(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """An iterator over the same loader that begins behind what is done, and loads nothing of it."""
        later = copy.copy(loader)
        if type(loader.batch_sampler) is BatchSampler:
            # By samples, for the batch size or the world size may be another one.
            batched = loader.batch_sampler
            rest = _Later(batched.sampler, self._samples // self._world_size)
            self._set(later, "batch_sampler", BatchSampler(rest, batched.batch_size, batched.drop_last))
        elif loader.batch_sampler is not None:
            rest = _Later(loader.batch_sampler, self._skip)
            self._set(later, "batch_sampler", rest)
        else:
            rest = _Later(loader.sampler, self._skip)
            self._set(later, "sampler", rest)
        self._set(later, "_iterator", None)
        iterator = iter(later)
        # The loader has drawn its base seed; a sampler draws its own at its first sample, which is now and not later.
        rest.skip()
        return iterator

    @staticmethod
    def _set(loader: DataLoader[Any], name: str, value: object) -> None:
        # DataLoader forbids to set this once it is made, for its iterators would not notice; the copy has none yet.
        object.__setattr__(loader, name, value)

    def _generators(self) -> list[torch.Generator]:
        """The loader's own generators, each once."""
        found = [getattr(holder, "generator", None) for holder in (self._loader, *self._samplers())]
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())

    def _samplers(self) -> list[object]:
        """The loader's samplers, where it has any: a batch sampler has another inside."""
        batched = getattr(self._loader, "batch_sampler", None)
        found = [getattr(self._loader, "sampler", None), batched, getattr(batched, "sampler", None)]
        return list({id(one): one for one in found if one is not None}.values())

    def _now(self) -> list[bytes]:
        return [random_state.of_generator(generator) for generator in self._generators()]

    def _samples_per_batch(self) -> int:
        batched = getattr(self._loader, "batch_sampler", None)
        holder = batched if type(batched) is BatchSampler else self._loader
        return (getattr(holder, "batch_size", None) or 1) * self._world_size


_NOTHING = object()


class _Later(Sampler[Any]):
    """A sampler without its first `count` draws."""

    def __init__(self, sampler: Any, count: int) -> None:
        self._sampler = sampler
        self._count = count
        self._rest: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        # Not before the first draw: a DataLoader asks for the iterator before it draws its base seed.
        self.skip()
        assert self._rest is not None
        yield from self._rest

    def __len__(self) -> int:
        return max(0, len(self._sampler) - self._count)

    def skip(self) -> None:
        if self._rest is None:
            self._rest = iter(self._sampler)
            for _ in itertools.islice(self._rest, self._count):
                pass


def _without_tensors(value: Any, where: str) -> Any:
    """A loader's own state as plain data: it may hold small tensors, such as a generator's state."""
    if isinstance(value, torch.Tensor):
        return {_TENSOR: value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {key: _without_tensors(one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, list):
        return [_without_tensors(one, f"{where}[{place}]") for place, one in enumerate(value)]
    if isinstance(value, tuple):
        return tuple(_without_tensors(one, f"{where}[{place}]") for place, one in enumerate(value))
    plain_data.encode(value, where)
    return value


def _with_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return torch.tensor(value[_TENSOR], dtype=getattr(torch, value["dtype"]))
        return {key: _with_tensors(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_tensors(one) for one in value]
    if isinstance(value, tuple):
        return tuple(_with_tensors(one) for one in value)
    return value


_TENSOR = "a tensor's values"
