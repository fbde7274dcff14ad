"""Two checkpoints, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from ftrain.checkpoint.state.source import TensorSource
from ftrain.checkpoint.tools.describe import names_of, owner
from ftrain.checkpoint.tools.opening import Everything, Natural, natural
from ftrain.checkpoint.tools.statistics import Statistics, slices
from ftrain.checkpoint.tools.stream import pairs
from ftrain.checkpoint.wire import as_bytes


@dataclass(slots=True)
class Change:
    """What became of one tensor. Figures of the change are of the elements that are finite in both."""

    key: str
    dtypes: tuple[str, str]
    shape: tuple[int, ...]
    before: Statistics = field(default_factory=Statistics)
    after: Statistics = field(default_factory=Statistics)
    squares: float = 0.0
    max_change: float = 0.0
    max_at: tuple[int, ...] = ()
    sick_at: tuple[int, ...] = ()  # the first element that is NaN or infinite, and was neither before
    is_same: bool = True  # bit by bit

    @property
    def norm(self) -> float:
        """Of the difference."""
        return math.sqrt(self.squares)

    @property
    def relative(self) -> float:
        """The norm of the difference by that of the tensor before."""
        if not self.before.squares:
            return math.inf if self.squares else 0.0
        return math.sqrt(self.squares / self.before.squares)

    @property
    def became_sick(self) -> bool:
        """It has more NaNs or infinities than before."""
        return self.after.nans > self.before.nans or self.after.infs > self.before.infs


@dataclass(frozen=True, slots=True)
class Comparison:
    # Of tensors that are in both, of one shape; the sickest first, then the most changed. Optimizers' state, most of
    # which is new after some steps in any run, comes behind all others.
    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def is_same(self) -> bool:
        """Both hold the same tensors, bit by bit."""
        others = self.only_before or self.only_after or self.reshaped
        return not others and all(change.is_same for change in self.changes)


def compare(
    before: TensorSource, after: TensorSource, before_keys: Sequence[str], after_keys: Sequence[str]
) -> Comparison:
    """The tensors of these keys. Reads both, in bounded memory. Raises `CorruptCheckpoint`."""
    there = set(after_keys)
    here = set(before_keys)
    both = [key for key in before_keys if key in there]
    equal = [key for key in both if before.tensors[key].shape == after.tensors[key].shape]
    changes = {
        key: Change(key, (before.tensors[key].dtype, after.tensors[key].dtype), before.tensors[key].shape)
        for key in equal
    }
    for change in changes.values():
        change.is_same = change.dtypes[0] == change.dtypes[1]
    for first, second in pairs(before, after, equal):
        _add(changes[first.key], first.tensor, second.tensor, first.box.offset)
    optimizers = {*_optimizers(before), *_optimizers(after)}
    return Comparison(
        tuple(sorted(changes.values(), key=lambda change: _order(change, optimizers))),
        tuple(key for key in before_keys if key not in there),
        tuple(key for key in after_keys if key not in here),
        tuple((key, before.tensors[key].shape, after.tensors[key].shape) for key in both if key not in changes),
    )


def _add(change: Change, before: torch.Tensor, after: torch.Tensor, offset: tuple[int, ...]) -> None:
    change.before.add(before)
    if before.dtype == after.dtype and torch.equal(as_bytes(before), as_bytes(after)):
        change.after.add(after)
        return
    change.after.add(after)
    change.is_same = False
    width = 2 if before.is_complex() else 1
    if before.is_complex() != after.is_complex():
        return
    begin = 0
    for one, other in zip(slices(before), slices(after), strict=True):
        difference = (other - one).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        difference[~(one.isfinite() & other.isfinite())] = 0.0
        sick = (one.isfinite() & ~other.isfinite()).nonzero()
        if len(sick) and not change.sick_at:
            change.sick_at = _place(begin + int(sick[0]), width, before, offset)
        change.squares += float(difference.dot(difference))
        largest, place = difference.abs().max(dim=0)
        if float(largest) > change.max_change:
            change.max_change = float(largest)
            change.max_at = _place(begin + int(place), width, before, offset)
        begin += len(difference)


def _place(number: int, width: int, part: torch.Tensor, offset: tuple[int, ...]) -> tuple[int, ...]:
    """Of a value of a part, the place in the whole tensor."""
    local = torch.unravel_index(torch.tensor(number // width), part.shape)
    return tuple(int(at) + start for at, start in zip(local, offset, strict=True))


def _order(change: Change, optimizers: Collection[str]) -> tuple[bool, bool, bool, float, Natural]:
    is_of_optimizer = owner(change.key, optimizers) != ""
    return not change.became_sick, change.is_same, is_of_optimizer, -change.relative, natural(change.key)


def _optimizers(source: TensorSource) -> list[str]:
    """Names, where the source tells what was tracked."""
    return names_of("optimizer", source.checkpoint) if isinstance(source, Everything) else []
