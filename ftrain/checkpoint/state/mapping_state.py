"""Nested dicts and lists of tensors and plain data, such as a `state_dict`: tensors are shared, filled in place."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, MutableSequence, Sequence
from typing import Any

import torch

from ftrain.checkpoint.state.items import TensorItem, items_of, local_of
from ftrain.checkpoint.state.part import Part, Saved, normal
from ftrain.core import plain as plain_data

Holder = MutableMapping[Any, Any] | MutableSequence[Any]


class MappingState:
    """Keys: the path in the mapping, its names joined by dots, after `prefix`."""

    def __init__(self, prefix: str, mapping: MutableMapping[Any, Any]) -> None:
        self._prefix = prefix
        self._mapping = mapping
        self._found: dict[str, Any] = {}  # what `finish` puts in the place of values
        self._keys: list[str] = []
        self._items: list[TensorItem] = []

    @property
    def has_tensors(self) -> bool:
        return bool(self._leaves()[1])

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
        keys, tensors, values = self._leaves()
        wants = saved.terms.wants
        self._found = {}
        wanted = [path for path in values if wants(path)]
        if wanted:
            there = dict(self._saved_values(plain, saved, wanted))
            self._found = {path: there[path] for path in wanted if path in there}
            saved.missing.extend(path for path in wanted if path not in there)
        items = items_of(keys, tensors)
        return items if all(map(wants, keys)) else [item for item in items if wants(item.spec.key)]

    def finish(self) -> None:
        if self._found:
            for path, holder, key, value in _walk(self._prefix, self._mapping):
                if path in self._found and not isinstance(value, torch.Tensor):
                    holder[key] = self._found[path]
        self._found = {}

    def _saved_values(self, plain: Any, saved: Saved, wanted: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Values by the paths of here: this rank's own last, and before it what others have where it has not all."""
        here = saved.terms.here
        own = {here(path): value for path, value in (plain or {}).get("values", {}).items()}
        if not own.keys() >= set(wanted):
            for other in saved.others():
                yield from ((here(path), value) for path, value in other.get("values", {}).items())
        yield from own.items()

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
