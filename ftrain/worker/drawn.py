"""Batches that were handed out and may have to be handed out again, as they were."""

from __future__ import annotations

from typing import Any

import torch

_LEAVES = frozenset({type(None), bool, int, float, complex, str, bytes})


class Kept:
    """A batch of tensors, plain values, and dicts, lists and tuples of these.

    The containers are copied, the tensors are not: their version counters tell whether somebody wrote to them.
    (Writing to a tensor through NumPy or `.data` is not counted.)
    """

    __slots__ = ("_tensors", "_tree", "_versions")

    def __init__(self, batch: Any) -> None:
        """Raises `TypeError` for a batch that holds anything else: nothing would tell whether it has changed."""
        self._tensors: list[torch.Tensor] = []
        self._tree = _copy(batch, self._tensors)
        self._versions = [tensor._version for tensor in self._tensors]

    @property
    def is_whole(self) -> bool:
        """Nothing has written to it since."""
        return all(tensor._version == version for tensor, version in zip(self._tensors, self._versions, strict=True))

    def give(self) -> Any:
        """The batch, in containers of its own."""
        return _copy(self._tree, [])


def keep(batch: Any) -> Kept | None:
    """The batch as it is now; None for one that cannot be kept."""
    try:
        return Kept(batch)
    except TypeError:
        return None


def _copy(value: Any, tensors: list[torch.Tensor]) -> Any:
    kind = type(value)
    if kind in _LEAVES:
        return value
    if isinstance(value, torch.Tensor):
        if value.requires_grad or value.is_inference():
            raise TypeError("belongs to a graph, or counts no versions")
        alias = (
            value.detach()
        )  # what the step makes of the tensor object itself, such as requiring gradients, is left out
        tensors.append(alias)
        return alias
    if kind is dict:
        return {key: _copy(one, tensors) for key, one in value.items()}
    if kind is list or kind is tuple:
        return kind(_copy(one, tensors) for one in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(_copy(one, tensors) for one in value))
    raise TypeError(f"a {kind.__qualname__} may change unnoticed")
