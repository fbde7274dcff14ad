"""An endless iterator over a loader whose position is part of the tracked state: each sample exactly once an epoch.

To resume, every random number generator goes back to where it was when the epoch began, the loader begins that epoch
again, and what was delivered is skipped: a DataLoader's sampler is drawn from without loading anything, another
loader's batches are drawn. A process that only goes back to a boundary of its own does none of this: it kept what it
drew since then, and hands it out again.

The position is kept in samples of the whole run, not in batches of one rank, so that it also holds in another world
size: with a `DistributedSampler`, after `k` batches of `b` samples on each of `w` ranks, the first `k·b·w` samples of
the epoch's order are done.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from ftrain.core import plain as plain_data
from ftrain.errors import MismatchedState, UsageError
from ftrain.worker import random_state
from ftrain.worker.drawn import Kept, keep

BOUNDARIES_KEPT = 2  # as many as the black box holds


@dataclass(frozen=True, slots=True)
class _Position:
    """Where a loader is, as `Batches` counts it, and the loader's own state there, if it has one."""

    epoch: int
    delivered: int
    skip: int
    samples: int
    rng: dict[str, object] | None
    own_rng: list[bytes]
    own_state: Any
    loader: Any


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A batch, and where the loader and all random numbers were when it had been drawn."""

    batch: Kept | None
    position: _Position
    random: dict[str, object]


@dataclass(frozen=True, slots=True)
class _Boundary:
    """A boundary, and what was drawn between it and the next one."""

    state: dict[str, object]
    position: _Position
    drawn: list[_Drawn] = field(default_factory=list)


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
        self._boundaries: deque[_Boundary] = deque(maxlen=BOUNDARIES_KEPT)
        self._again: deque[_Drawn] = deque()  # rolled back: to be handed out before anything is drawn
        self._at: _Position | None = None  # rolled back: where the loader would be, for it is ahead
        self._is_drawing = False  # also after a draw that failed in the middle

    @property
    def epoch(self) -> int:
        return self._epoch

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        if self._again:
            return self._give_again(self._again.popleft())
        self._is_drawing = True
        batch = self._draw()
        self._at = None
        if self._boundaries:
            self._boundaries[-1].drawn.append(_Drawn(keep(batch), self._position(), random_state.capture()))
        self._is_drawing = False
        return batch

    def state(self) -> dict[str, object]:
        """Plain data. To be called at a step's boundary."""
        return self._state_at(self._position())

    def mark(self) -> dict[str, object]:
        """As `state`; and from now on keep what is drawn, to hand it out again after `roll_back`.

        What was drawn since the boundary before the last is let go.
        """
        position = self._position()
        state = self._state_at(position)
        self._boundaries.append(_Boundary(state, position))
        return state

    def roll_back(self, state: dict[str, Any]) -> None:
        """Continue as after the batch that `mark` gave the state after, in this process or in another.

        The caller puts the random numbers back. Batches that were drawn here since one of the last two marks are
        handed out again. Where there are none, or the step has changed them, the loader begins anew, as in `restore`.
        """
        drawn: list[_Drawn] = []
        while self._boundaries and not self._is_drawing:
            boundary = self._boundaries.pop()
            drawn[:0] = boundary.drawn
            if boundary.state == state:
                again = [*drawn, *self._again]
                if all(one.batch is not None and one.batch.is_whole for one in again):
                    self._again = deque(again)
                    self._move(boundary.position)
                    self._boundaries.append(_Boundary(boundary.state, boundary.position))
                    return
                break
        self.restore(state)
        self.prepare()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after the batch that the state was saved after."""
        self._boundaries.clear()
        self._again.clear()
        self._at, self._is_drawing = None, False
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

    def _draw(self) -> Any:
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

    def _give_again(self, drawn: _Drawn) -> Any:
        self._boundaries[-1].drawn.append(drawn)
        self._move(drawn.position)
        random_state.restore(drawn.random)
        assert drawn.batch is not None
        return drawn.batch.give()

    def _state_at(self, position: _Position) -> dict[str, object]:
        return {
            "epoch": position.epoch,
            "batches": position.skip + position.delivered,
            "samples": position.samples + position.delivered * self._samples_per_batch(),
            "world_size": self._world_size,
            "rng": position.rng,
            "own_rng": position.own_rng,
            "loader": position.loader,
        }

    def _position(self) -> _Position:
        return _Position(
            self._epoch,
            self._delivered,
            self._skip,
            self._samples,
            self._rng,
            self._own_rng,
            self._own_state,
            self._loader_state() if self._at is None else self._at.loader,
        )

    def _loader_state(self) -> Any:
        stateful = getattr(self._loader, "state_dict", None)
        return _without_tensors(stateful(), self._name) if stateful is not None else None

    def _move(self, position: _Position) -> None:
        """Count as if the loader were there."""
        self._epoch, self._delivered = position.epoch, position.delivered
        self._skip, self._samples = position.skip, position.samples
        self._rng, self._own_rng, self._own_state = position.rng, position.own_rng, position.own_state
        self._at = position

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
