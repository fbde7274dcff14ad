"""Whether tensors are where they were, as they were: asked at every snapshot, of tens of thousands."""

from __future__ import annotations

import inspect
import operator
from array import array
from collections.abc import Callable
from types import GetSetDescriptorType
from typing import Any

import torch

from ftrain import _native
from ftrain.checkpoint.host import all_lie_in_host_memory

# A look at tensors: two of one kind are equal where memory, shapes, strides, types and devices all are.
Look = _native.Look | tuple[list[Any], ...]

_Question = Callable[[torch.Tensor], Any]

PLAIN = (torch.Tensor, torch.nn.Parameter)
_exchange: object = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # not in older versions of torch
_version: object = inspect.getattr_static(torch.Tensor, "_version")
_forms: list[_Question] = [operator.attrgetter(name) for name in ("shape", "dtype", "device")]
_ordinary: list[_Question] = [torch.Tensor.is_conj, torch.Tensor.is_neg, torch.Tensor.is_inference]


def look(tensors: list[torch.Tensor], before: Look | None = None) -> Look:
    """A look at any dense tensors. Quicker with an earlier one at the same."""
    quick = quick_look(tensors, before)
    if quick is not None:
        return quick
    questions: list[_Question] = [id, torch.Tensor.data_ptr, torch.Tensor.stride, *_forms, *_ordinary]
    return tuple(list(map(question, tensors)) for question in questions)


def quick_look(tensors: list[torch.Tensor], before: Look | None = None) -> _native.Look | None:
    """In about 100 ns a tensor; None where one of them is not dense, plain and real, or torch has no way for that."""
    return None if _exchange is None else _native.look(tensors, PLAIN, _exchange, _hint(before))


def is_unchanged(tensors: list[torch.Tensor], now: Look, before: Look | None) -> bool:
    """Whether `now`, a look at the tensors, finds them as `before`; their contents may differ."""
    if before is None or now != before:
        return False
    # What a quick look does not see is a matter of the object: others at the same place are asked one by one.
    same_objects = not isinstance(now, _native.Look) or (isinstance(before, _native.Look) and now.is_of(before))
    return same_objects or not any(any(map(question, tensors)) for question in _ordinary)


def host_addresses(tensors: list[torch.Tensor]) -> array[int] | None:
    """Where the tensors are, if all of them lie in host memory just as they are in a file; None where one does not."""
    quick = quick_look(tensors)
    if quick is None:
        return array("Q", map(torch.Tensor.data_ptr, tensors)) if all_lie_in_host_memory(tensors) else None
    if not quick.all_in_host_memory or any(map(torch.Tensor.is_neg, tensors)):
        return None
    return array("Q", quick.addresses())


def versions(tensors: list[torch.Tensor], before: Look | None = None) -> bytes:
    """How often each tensor was changed in place, as signed 64-bit words. `before` is as in `look`."""
    if isinstance(_version, GetSetDescriptorType):
        return _native.counters(tensors, _version, _hint(before))
    return array("q", [tensor._version for tensor in tensors]).tobytes()


def _hint(before: Look | None) -> _native.Look | None:
    return before if isinstance(before, _native.Look) else None
