"""Whether tensors are where they were, as they were: asked at every snapshot, of tens of thousands."""

from __future__ import annotations

import functools
import inspect
import operator
from array import array
from collections.abc import Callable
from types import GetSetDescriptorType
from typing import Any

import torch

from ftrain import _native
from ftrain.checkpoint.staging.host import all_lie_in_host_memory

# A look at tensors: two of one kind are equal where memory, shapes, strides, types and devices all are.
Look = _native.Look | tuple[list[Any], ...]

_Question = Callable[[torch.Tensor], Any]

PLAIN = (torch.Tensor, torch.nn.Parameter)
MANY = 2048  # tensors: fewer are looked at in less time than it takes to hand them to a thread
_exchange: object = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # not in older versions of torch
_version: object = inspect.getattr_static(torch.Tensor, "_version")
_forms: list[_Question] = [operator.attrgetter(name) for name in ("shape", "dtype", "device")]
_ordinary: list[_Question] = [torch.Tensor.is_conj, torch.Tensor.is_neg, torch.Tensor.is_inference]


def look(tensors: list[torch.Tensor], before: Look | None = None, at_a_time: int = 0) -> Look:
    """A look at any dense tensors. Quicker with an earlier one at the same.

    After so many `at_a_time` (0: never) other threads have the interpreter for a moment.
    """
    quick = quick_look(tensors, before, at_a_time)
    if quick is not None:
        return quick
    questions: list[_Question] = [id, torch.Tensor.data_ptr, torch.Tensor.stride, *_forms, *_ordinary]
    return tuple(list(map(question, tensors)) for question in questions)


def quick_look(tensors: list[torch.Tensor], before: Look | None = None, at_a_time: int = 0) -> _native.Look | None:
    """In about 100 ns a tensor; None where one of them is not dense, plain and real, or torch has no way for that."""
    if _exchange is None:
        return None
    return _native.look(tensors, PLAIN, _exchange, _hint(before), _anatomy(), at_a_time)


def recall(
    before: _native.Look, dicts: list[dict[Any, Any]], keys: list[Any]
) -> tuple[list[torch.Tensor], bytes] | None:
    """The tensors in these dicts and their `versions`, where keys and tensors are the same objects as before.

    And where each still has the memory that it had, unless that was moved or resized by itself: a look tells. In about
    20 ns a tensor. None where something is not the same, or cannot be told so quickly.
    """
    return before.recall(dicts, keys, PLAIN)


def is_unchanged(tensors: list[torch.Tensor], now: Look, before: Look | None) -> bool:
    """Whether `now`, a look at the tensors, finds them as `before`; their contents may differ."""
    if before is None or now != before:
        return False
    # What a quick look does not see is a matter of the object: others at the same place are asked one by one.
    same_objects = not isinstance(now, _native.Look) or (isinstance(before, _native.Look) and now.is_of(before))
    return same_objects or not any(any(map(question, tensors)) for question in _ordinary)


def recalled_versions(tensors: list[torch.Tensor], before: Look | None) -> bytes | None:
    """`versions`, where these are as `recall` wants them."""
    return before.versions(tensors) if isinstance(before, _native.Look) else None


def host_addresses(tensors: list[torch.Tensor]) -> array[int] | None:
    """Where the tensors are, if all of them lie in host memory just as they are in a file; None where one does not."""
    quick = quick_look(tensors)
    if quick is None:
        return array("Q", map(torch.Tensor.data_ptr, tensors)) if all_lie_in_host_memory(tensors) else None
    if not quick.all_in_host_memory or any(map(torch.Tensor.is_neg, tensors)):
        return None
    return array("Q", quick.addresses())


def versions(tensors: list[torch.Tensor], before: Look | None = None, at_a_time: int = 0) -> bytes:
    """How often each tensor was changed in place, as signed 64-bit words. The rest is as in `look`."""
    if isinstance(_version, GetSetDescriptorType):
        return _native.counters(tensors, _version, _hint(before), _anatomy(), at_a_time)
    return array("q", [tensor._version for tensor in tensors]).tobytes()


def _hint(before: Look | None) -> _native.Look | None:
    return before if isinstance(before, _native.Look) else None


@functools.cache
def _anatomy() -> _native.Anatomy | None:
    """Where this torch keeps version counters; None where that cannot be found out, or does not hold."""
    specimens = [_changed(times) for times in (3, 70, 301, 1, 12)]
    try:
        implementations = [tensor._cdata for tensor in specimens]
        found = _native.find_anatomy(specimens, implementations, [tensor._version for tensor in specimens])
    except (AttributeError, TypeError):
        return None
    return found if found is not None and _holds(found) else None


def _changed(times: int) -> torch.Tensor:
    tensor = torch.zeros(1)
    for _ in range(times):
        tensor.add_(1)
    return tensor


def _holds(anatomy: _native.Anatomy) -> bool:
    """Whether views count together, and another memory under a tensor is noticed."""
    whole = torch.zeros(4)
    some = [whole, whole[1:], torch.nn.Parameter(torch.zeros(2))]
    whole[2:].add_(1)
    if _exchange is None or not isinstance(_version, GetSetDescriptorType):
        return False
    seen = _native.look(some, PLAIN, _exchange, None, anatomy)
    named = dict(enumerate(some))
    keys = list(named)
    if seen is None or seen.recall([named], keys, PLAIN) != (some, _native.counters(some, _version)):
        return False
    some[2].data = torch.zeros(2)
    return seen.recall([named], keys, PLAIN) is None
