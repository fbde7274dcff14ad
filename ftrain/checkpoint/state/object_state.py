"""Anything with `state_dict` and `load_state_dict`: its tensors and plain data belong to its rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from ftrain.checkpoint.state.items import TensorItem, dtype_name, item_of, torch_dtype
from ftrain.checkpoint.state.part import Part, Saved, normal
from ftrain.checkpoint.state.source import TensorInfo
from ftrain.core import plain as plain_data
from ftrain.errors import MismatchedState


@runtime_checkable
class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class ObjectState:
    """Keys: `<name>.<path in the state dict>`."""

    def __init__(self, name: str, found: Stateful) -> None:
        self._name = name
        self.found = found
        self._state: Any = None
        self._items: list[TensorItem] = []

    def part(self) -> Part:
        part = Part()
        part.plain["state"] = _flatten(self.found.state_dict(), self._name, part.items)
        self._items = part.items
        return part

    def plain_if_same(self) -> dict[str, object] | None:
        before = self._items
        part = self.part()
        same = [item.local for item in before], [item.local for item in part.items]
        if len(same[0]) == len(same[1]) and all(a is b for a, b in zip(*same, strict=True)):
            self._items = before
            return part.plain
        return None

    def prepare(self, plain: Any, saved: Saved) -> list[TensorItem]:
        items: list[TensorItem] = []
        self._state = None
        if not saved.terms.wants_object(self._name):
            return items
        if plain is None:
            saved.missing.append(self._name)
        elif "state" not in plain:
            raise MismatchedState(f"{self._name}: the checkpoint has a module, an optimizer or a dict under this name")
        elif saved.private is not None:
            self._state = _unflatten(plain["state"], saved, items)
        return items

    def finish(self) -> None:
        if self._state is not None:
            self.found.load_state_dict(self._state)
            self._state = None

    def own(self) -> Part:
        part = Part()
        state = self.found.state_dict()
        if _is_flat(state):
            part.plain["flat"] = normal(state)
        else:
            part.plain["state"] = _flatten(state, self._name, part.items)
        return part

    def take_back(self, plain: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        if "flat" in plain:
            self.found.load_state_dict(plain["flat"])
            return
        infos = {
            key: TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape), private=True)
            for key, tensor in tensors.items()
        }
        for item in self.prepare(plain, Saved({}, infos)):
            item.local.copy_(tensors[item.spec.key])
        self.finish()


_FLAT = frozenset({type(None), bool, int, float, str, bytes})


def _is_flat(state: Any) -> bool:
    """Nothing in it can hold a tensor: most schedulers, asked at every boundary."""
    return type(state) is dict and all(
        type(one) in _FLAT or (type(one) is list and _FLAT.issuperset(map(type, one))) for one in state.values()
    )


def _flatten(value: Any, path: str, items: list[TensorItem]) -> object:
    """Plain data in which a tensor has become a note of its key."""
    if isinstance(value, torch.Tensor):
        items.append(item_of(path, value, private=True))
        return {"tensor": path, "device": value.device.type}
    if isinstance(value, dict):
        return {"dict": [(key, _flatten(one, f"{path}.{key}", items)) for key, one in value.items()]}
    if isinstance(value, (list, tuple)):
        parts = [_flatten(one, f"{path}.{place}", items) for place, one in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": parts}
    leaf = normal(value)
    plain_data.encode(leaf, path)  # here the path is still the one that the user knows
    return {"value": leaf}


def _unflatten(node: Any, saved: Saved, items: list[TensorItem]) -> Any:
    if "tensor" in node:
        key = saved.terms.here(node["tensor"])
        info = (saved.private or {}).get(key)
        if info is None:
            raise MismatchedState(f"{node['tensor']}: the checkpoint names this tensor but does not hold it")
        tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        if node["device"] == "cuda" and torch.cuda.is_available():
            tensor = tensor.cuda()
        items.append(item_of(key, tensor, private=True))
        return tensor
    if "dict" in node:
        return {key: _unflatten(one, saved, items) for key, one in node["dict"]}
    if "list" in node:
        return [_unflatten(one, saved, items) for one in node["list"]]
    if "tuple" in node:
        return tuple(_unflatten(one, saved, items) for one in node["tuple"])
    return node["value"]
