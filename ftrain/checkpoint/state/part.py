"""What one tracked object gives to a checkpoint, and what it is given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ftrain.checkpoint.state.items import TensorItem
from ftrain.checkpoint.state.source import TensorInfo
from ftrain.checkpoint.state.terms import EVERYTHING, Terms


@dataclass(slots=True)
class Part:
    """Tensors, and plain data for this rank."""

    items: list[TensorItem] = field(default_factory=list)
    plain: dict[str, object] = field(default_factory=dict)


def _nobody() -> Iterator[Any]:
    return iter(())


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint has for one object: tensors by key, those that all ranks share, and this rank's own.

    Keys are those of here; what plain data says is by the names that it was saved under, for `terms` to translate.
    `private` is None where only what ranks share is restored: what is this rank's alone is to stay as it is.
    """

    shared: Mapping[str, TensorInfo]
    private: Mapping[str, TensorInfo] | None
    name: str = ""  # of the object in the checkpoint
    terms: Terms = EVERYTHING
    others: Callable[[], Iterator[Any]] = _nobody  # the object's plain data on other ranks, where it differs
    missing: list[str] = field(default_factory=list)  # what the checkpoint has not, and that is no tensor


class Source(Protocol):
    """One object's way into a checkpoint and back."""

    def part(self) -> Part:
        """Everything, as it is now."""
        ...

    def plain_if_same(self) -> dict[str, object] | None:
        """The plain data as it is now, where the items of the last `part` still hold; None where they do not.

        Asked at every snapshot, so it has to be quick.
        """
        ...

    def prepare(self, plain: Any, saved: Saved) -> list[TensorItem]:
        """The tensors to be filled from a checkpoint, given the plain data of the object in it, None without any.

        Raises `MismatchedState` where the two do not go together.
        """
        ...

    def finish(self) -> None:
        """The tensors are filled: take over the rest of what `prepare` was given. Nothing if it was not called."""
        ...


class OwnSource(Source, Protocol):
    """A source that can also put back what is its rank's alone, without a checkpoint."""

    def own(self) -> Part:
        """What is this rank's alone, as it is now: plain data and private tensors. Asked at every boundary.

        Tensors that are not private are those that `take_back` could not put back although they are no optimizer's:
        the caller watches them.
        """
        ...

    def take_back(self, plain: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `own` gave, in this process or in another: plain data, and tensors by key."""
        ...


@dataclass(frozen=True, slots=True)
class Watched:
    """A tensor as it was found in some dictionary, and the local tensor that was in it."""

    holder: Mapping[Any, Any]
    key: Any
    tensor: torch.Tensor
    local: torch.Tensor

    def is_there(self) -> bool:
        found = self.holder.get(self.key)
        if found is not self.tensor:
            return False
        return self.local is self.tensor or self.tensor._local_tensor is self.local


def normal(value: Any) -> Any:
    """Plain types for their subclasses: what PyTorch's own objects put into their state."""
    if isinstance(value, dict):
        return {key: normal(one) for key, one in value.items()}
    if isinstance(value, list):
        return [normal(one) for one in value]
    if isinstance(value, tuple):
        return tuple(normal(one) for one in value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    return value
