"""A module's parameters and buffers. A buffer that this rank has changed since then is saved for this rank, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ftrain.checkpoint.state.items import TensorItem, item_of, local_of
from ftrain.checkpoint.state.own_buffers import OwnBuffers, checksum_of, counting, holders_of
from ftrain.checkpoint.state.part import Part, Saved, Watched, normal
from ftrain.errors import MismatchedState

COMPILED = "_orig_mod."


class ModuleState:
    """Keys: `<name>.<parameter>`."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self.module = module  # as it is tracked, wrappers included
        self._module = _unwrapped(module)
        self.replicated = isinstance(module, DistributedDataParallel) or isinstance(
            getattr(module, "_orig_mod", None), DistributedDataParallel
        )
        buffers = {id(buffer) for buffer in self._module.buffers()}
        found = {key: tensor for key, tensor in self.tensors() if id(tensor) in buffers}
        self._buffers = set(found)
        self._began = {key: checksum_of(tensor) for key, tensor in found.items()}
        self._extra: dict[str, Any] = {}
        self._watched: list[Watched] | None = None  # None: the state dict is not simply what the modules hold
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._unchanged: dict[str, tuple[torch.Tensor, int]] = {}  # buffers, with the version that was looked at
        self._counting = counting(self._module, found)
        self._own: OwnBuffers | None = None

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and persistent buffers, each once however often it is tied."""
        seen: set[int] = set()
        for key, value in self._module.state_dict(keep_vars=True).items():
            if isinstance(value, torch.Tensor) and id(value) not in seen:
                seen.add(id(value))
                yield _clean(key), value

    def part(self) -> Part:
        part = Part()
        self._unchanged = {}
        found = list(self.tensors())
        for key, tensor in found:
            part.items.append(item_of(f"{self._name}.{key}", tensor, late=key not in self._buffers))
            if key not in self._buffers:
                continue
            if checksum_of(tensor) != self._began[key]:
                part.items.append(item_of(f"{self._name}.{key}", tensor, private=True))
            else:
                self._unchanged[key] = (tensor, tensor._version)
        extra = self._find_extra()
        part.plain["extra"] = normal(extra)
        self._watch([tensor for _, tensor in found], has_extra=bool(extra))
        return part

    def plain_if_same(self) -> dict[str, object] | None:
        if self._watched is None or any(len(holder) != size for holder, size in self._sizes):
            return None
        if not all(one.is_there() for one in self._watched):
            return None
        for key, (tensor, version) in self._unchanged.items():
            if tensor._version != version or key not in self._counting:
                if checksum_of(tensor) != self._began[key]:
                    return None
                self._unchanged[key] = (tensor, tensor._version)
        return {"extra": {}}

    def prepare(self, plain: Any, saved: Saved) -> list[TensorItem]:
        self._extra = self._saved_extra(plain, saved) if plain is not None and saved.private is not None else {}
        self._own = None  # what the buffers were in the beginning is of no use: they become what the others have
        private = saved.private or {}
        items = []
        for key, tensor in self.tensors():
            full = f"{self._name}.{key}"
            if not saved.terms.wants(full):
                continue
            if saved.private is None and full not in saved.shared and key in self._buffers:
                continue  # it is each rank's own by now
            items.append(item_of(full, tensor))
            if full in private:
                items.append(item_of(full, tensor, private=True))
        return items

    def _saved_extra(self, plain: Any, saved: Saved) -> dict[str, Any]:
        """What a state dict has beside tensors, by its keys here; from other ranks what this one did not have."""
        terms = saved.terms

        def translated(extra: Mapping[str, Any]) -> dict[str, Any]:
            named = {terms.here(f"{saved.name}.{key}"): value for key, value in extra.items()}
            return {key.removeprefix(f"{self._name}."): value for key, value in named.items() if terms.wants(key)}

        found = translated(plain.get("extra", {}))  # a dict of its tensors has none
        if self._find_extra().keys() - found.keys():
            for other in saved.others():
                found = {**translated(other.get("extra", {})), **found}
        return found

    def finish(self) -> None:
        for parameter in self._module.parameters():
            parameter.grad = None  # a rehearsed step may have left some
        if self._extra:
            self._module.load_state_dict(self._extra, strict=False)
        self._extra = {}

    def own(self) -> Part:
        if self._own is None or not self._own.are_there():
            buffers = {key: tensor for key, tensor in self.tensors() if key in self._buffers}
            self._own = OwnBuffers(self._name, self._module, buffers, self._began, bool(self._find_extra()))
        part = self._own.part()
        if self._own.has_extra:
            part.plain["extra"] = normal(self._find_extra())
        return part

    def take_back(self, plain: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        if self._own is not None:
            self._own.put_back(tensors)
        found = {f"{self._name}.{key}": tensor for key, tensor in self.tensors() if key in self._buffers}
        for key, saved in tensors.items():
            if key not in found:
                raise MismatchedState(f"{key}: was a buffer, and is none now; use the module that the run began with")
            local_of(found[key]).detach().copy_(saved)
        self._extra = plain.get("extra", {})
        self.finish()

    def _find_extra(self) -> dict[str, Any]:
        """What a state dict has beside tensors."""
        return {
            _clean(key): value
            for key, value in self._module.state_dict().items()
            if not isinstance(value, torch.Tensor)
        }

    def _watch(self, tensors: list[torch.Tensor], *, has_extra: bool) -> None:
        self._sizes = [
            (holder, len(holder))
            for module in self._module.modules()
            for holder in (module._parameters, module._buffers, module._modules)
        ]
        holders = holders_of(self._module)
        if has_extra or any(id(tensor) not in holders for tensor in tensors):
            self._watched = None
            return
        self._watched = [Watched(*holders[id(tensor)], tensor, local_of(tensor)) for tensor in tensors]


def _unwrapped(module: nn.Module) -> nn.Module:
    """The user's own module inside DDP and torch.compile."""
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def _clean(key: str) -> str:
    return key.replace(COMPILED, "")
