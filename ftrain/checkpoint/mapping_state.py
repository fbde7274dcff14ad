"""Nested dicts and lists of tensors and plain data, such as a `state_dict`: tensors are shared, filled in place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, MutableMapping, MutableSequence
from typing import Any

import torch

from ftrain.checkpoint.items import TensorItem, items_of, local_of
from ftrain.checkpoint.part import Part, Saved, normal
from ftrain.core import plain as plain_data
from ftrain.errors import MismatchedState

Holder = MutableMapping[Any, Any] | MutableSequence[Any]


class MappingState:
    """Keys: the path in the mapping, its names joined by dots, after `prefix`."""

    def __init__(self, prefix: str, mapping: MutableMapping[Any, Any]) -> None:
        self._prefix = prefix
        self._mapping = mapping
        self._saved: dict[str, Any] = {}
        self._has_values = False
        self._keys: list[str] = []
        self._items: list[TensorItem] = []

    def part(self) -> Part:
        part = Part()
        keys, tensors, values = self._leaves()
        part.items = items_of(keys, tensors)
        self._keys, self._items = keys, part.items
        part.plain["values"] = values
        return part

    def plain_if_same(self) -> dict[str, object] | None:
        keys, tensors, values = self._leaves()
        if keys != self._keys:
            return None
        if not all(item.local is local_of(tensor) for item, tensor in zip(self._items, tensors, strict=True)):
            return None
        return {"values": values}

    def prepare(self, plain: Any, saved: Saved) -> list[TensorItem]:
        del saved
        self._saved = plain["values"]
        keys, tensors, values = self._leaves()
        self._has_values = bool(values)
        return items_of(keys, tensors)

    def finish(self) -> None:
        if not self._saved and not self._has_values:
            return
        for path, holder, key, value in _walk(self._prefix, self._mapping):
            if isinstance(value, torch.Tensor):
                continue
            if path not in self._saved:
                raise MismatchedState(f"{path}: the checkpoint has no such value; it has {_some(self._saved)}")
            holder[key] = self._saved[path]
        self._saved = {}

    def _leaves(self) -> tuple[list[str], list[torch.Tensor], dict[str, object]]:
        keys: list[str] = []
        tensors: list[torch.Tensor] = []
        values: dict[str, object] = {}
        if all(isinstance(value, torch.Tensor) for value in self._mapping.values()):
            # The usual state dict; some have many thousands.
            before = f"{self._prefix}." if self._prefix else ""
            return [f"{before}{key}" for key in self._mapping], list(self._mapping.values()), values
        for path, _, _, value in _walk(self._prefix, self._mapping):
            if isinstance(value, torch.Tensor):
                keys.append(path)
                tensors.append(value)
            else:
                values[path] = normal(value)
                plain_data.encode(values[path], path)
        return keys, tensors, values


def _walk(prefix: str, holder: Holder) -> Iterator[tuple[str, Any, Any, Any]]:
    """(path, what holds it, its key there, value) of everything that is no dict or list with tensors in it."""
    pairs = holder.items() if isinstance(holder, MutableMapping) else enumerate(holder)
    for key, value in pairs:
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, torch.Tensor):
            yield path, holder, key, value
        elif isinstance(value, (MutableMapping, list)) and value:
            yield from _walk(path, value)
        else:
            yield path, holder, key, value


def _some(values: dict[str, Any]) -> str:
    return ", ".join(itertools.islice(values, 5)) or "none"
