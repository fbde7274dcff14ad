"""A checkpoint as the terms of a load show it: by the names of here, in the dtypes of here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import torch

from ftrain.checkpoint.batches import batches
from ftrain.checkpoint.state.items import TensorItem, torch_dtype
from ftrain.checkpoint.state.source import Held, TensorInfo
from ftrain.checkpoint.state.terms import Terms
from ftrain.errors import UsageError

CAST_BYTES_MAX = 256 << 20  # of tensors that are being converted at a time


class Selection:
    """What `Tracked` restores from in place of the checkpoint. `prefix` goes before keys: of a source without names.

    Raises `UsageError` where two tensors get one name.
    """

    def __init__(self, held: Held, terms: Terms, source: int, prefix: str = "") -> None:
        self._held = held
        self._terms = terms
        self._prefix = f"{prefix}." if prefix else ""
        self._is_renamed = terms.renames or bool(prefix)
        self._parameters: dict[str, str] = {}  # by the key of a piece of optimizer state, of here
        states = self._optimizer_keys(source) if self._is_renamed or terms.chooses else {}
        self._shared = self._renamed(held.tensors, states) if self._is_renamed else {}  # saved keys by those of here
        self._tensors = (
            {key: held.tensors[saved] for key, saved in self._shared.items()} if self._is_renamed else held.tensors
        )
        self._private: dict[int, dict[str, str]] = {}  # of each rank that was asked for, saved keys by those of here

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def private_tensors(self, rank: int) -> Mapping[str, TensorInfo] | None:
        found = self._held.private_tensors(rank)
        if found is None or not self._is_renamed:
            return found
        self._private[rank] = self._renamed(found, {})
        return {key: found[saved] for key, saved in self._private[rank].items()}

    def plain(self, rank: int) -> Mapping[str, object]:
        return self._held.plain(rank)

    def others(self, rank: int) -> Iterable[tuple[int, Mapping[str, object]]]:
        return self._held.others(rank)

    def wants(self, key: str) -> bool:
        """Whether a tensor is to be loaded: as the terms say, and optimizer state where its parameter is."""
        return self._terms.wants(key) or (key in self._parameters and self._terms.wants(self._parameters[key]))

    def read_into(self, items: Sequence[TensorItem], rank: int, *, elsewhere: Collection[str] = ()) -> None:
        """Fill what was compared already, private tensors with those of `rank`, converting where that was asked for."""
        del elsewhere
        infos = (self.private_tensors(rank) or {}) if any(item.spec.private for item in items) else self._tensors
        same = [item for item in items if infos[item.spec.key].dtype == item.spec.dtype]
        self._read([self._saved(item, rank) for item in same], rank)
        if len(same) < len(items):
            other = [item for item in items if infos[item.spec.key].dtype != item.spec.dtype]
            for batch in batches(other, lambda item: item.local.nbytes, CAST_BYTES_MAX):
                self._read_cast(batch, infos, rank)

    def _read_cast(self, items: Sequence[TensorItem], infos: Mapping[str, TensorInfo], rank: int) -> None:
        raw = []
        for item in items:
            dtype = infos[item.spec.key].dtype
            local = torch.empty(item.local.shape, dtype=torch_dtype(dtype), device=item.local.device)
            raw.append(self._saved(TensorItem(msgspec.structs.replace(item.spec, dtype=dtype), local), rank))
        self._read(raw, rank)
        for item, one in zip(items, raw, strict=True):
            item.local.detach().copy_(one.local)

    def _read(self, items: Sequence[TensorItem], rank: int) -> None:
        if items:
            self._held.read_into(items, rank, elsewhere=self._held.tensors.keys())

    def _saved(self, item: TensorItem, rank: int) -> TensorItem:
        """The item by the key that it was saved under."""
        if not self._is_renamed:
            return item
        keys = self._private[rank] if item.spec.private else self._shared
        return TensorItem(msgspec.structs.replace(item.spec, key=keys[item.spec.key]), item.local)

    def _renamed(self, tensors: Iterable[str], states: Mapping[str, str]) -> dict[str, str]:
        """Saved keys by those of here. `states` has those of optimizer state."""
        found: dict[str, str] = {}
        for saved in tensors:
            key = states.get(saved) or self._prefix + self._terms.here(saved)
            if key in found:
                raise UsageError(f"rename: {found[key]} and {saved} would both be {key}; give each tensor its own name")
            found[key] = saved
        return found

    def _optimizer_keys(self, source: int) -> dict[str, str]:
        """For each key of optimizer state that of here: it goes by what its parameter is called here."""
        found: dict[str, str] = {}
        here = self._terms.here
        for _, plain in [(source, self._held.plain(source)), *self._held.others(source)]:
            tracked: Any = plain.get("tracked")
            for name, said in (tracked if isinstance(tracked, dict) else {}).items():
                for parameter, states in said.get("order", {}).items():
                    for state in states:
                        key = f"{here(name)}.state.{here(parameter)}.{state}"
                        self._parameters[key] = here(parameter)
                        found[f"{name}.state.{parameter}.{state}"] = key
        return found
