"""An endless iterator over a loader whose position is part of the tracked state: each sample exactly once an epoch.

The position is kept in samples of the whole run, not in batches of one rank, so that it also holds in another world
size: with a `DistributedSampler`, after `k` batches of `b` samples on each of `w` ranks, the first `k·b·w` samples of
the epoch's order are done.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

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
            "loader": stateful() if stateful is not None else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after the batch that the state was saved after."""
        self._epoch = state["epoch"]
        self._own_state = state["loader"]
        self._rng = state["rng"]
        same = state["world_size"] == self._world_size
        self._skip = state["batches"] if same else self._batches_for(state["samples"])
        self._samples = state["samples"]
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
        for sampler in (getattr(self._loader, name, None) for name in ("sampler", "batch_sampler")):
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self._epoch)
        if self._own_state is not None:
            self._loader.load_state_dict(self._own_state)  # type: ignore[attr-defined]
            return iter(self._loader)
        if not self._skip:
            return iter(self._loader)
        if isinstance(self._loader, DataLoader) and self._loader.batch_sampler is not None:
            return _resumed(self._loader, self._skip)
        return itertools.islice(iter(self._loader), self._skip, None)

    def _samples_per_batch(self) -> int:
        return (getattr(self._loader, "batch_size", None) or 1) * self._world_size

    def _batches_for(self, samples: int) -> int:
        each = self._samples_per_batch()
        if samples % each:
            raise MismatchedState(
                f"{self._name}: {samples} samples of epoch {self._epoch} are done, no whole number of batches of "
                f"{each} samples on {self._world_size} ranks; choose a batch size that divides it"
            )
        return samples // each


def _resumed(loader: DataLoader[Any], skip: int) -> Iterator[Any]:
    """An iterator over the same loader, beginning `skip` batches later without loading what is skipped."""
    later = copy.copy(loader)
    sampler = _Later(loader.batch_sampler, skip)
    # DataLoader forbids to set this once it is made, because its own iterators would not notice; there are none yet.
    object.__setattr__(later, "batch_sampler", sampler)
    object.__setattr__(later, "_iterator", None)
    iterator = iter(later)
    # The loader has drawn its base seed; a sampler draws its own at its first batch, which is now and not later.
    sampler.skip()
    return iterator


class _Later(Sampler[list[int]]):
    """A batch sampler without its first batches."""

    def __init__(self, sampler: Any, skip: int) -> None:
        self._sampler = sampler
        self._skip = skip
        self._rest: Iterator[list[int]] = iter(())
        self._skipped = False

    def __iter__(self) -> Iterator[list[int]]:
        self._rest = iter(self._sampler)
        self._skipped = False
        return self._batches()

    def __len__(self) -> int:
        return max(0, len(self._sampler) - self._skip)

    def skip(self) -> None:
        if not self._skipped:
            self._skipped = True
            for _ in itertools.islice(self._rest, self._skip):
                pass

    def _batches(self) -> Iterator[list[int]]:
        self.skip()
        yield from self._rest
