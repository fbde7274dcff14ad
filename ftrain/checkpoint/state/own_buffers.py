"""A module's buffers: those that this rank has changed are its own, the others are what they were in the beginning."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ftrain import _native
from ftrain.checkpoint.state.items import TensorItem, item_of, local_of
from ftrain.checkpoint.state.part import Part, Watched

KEPT_BYTES_MAX = 64 << 20  # of one module's buffers, in copies of what they were
LOOKED_AT_BYTES_MAX = 64 << 10  # up to here a buffer in host memory is looked at whether or not it counts a change


class OwnBuffers:
    """A module's buffers at each boundary: which of them are this rank's alone, and what the others were."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        buffers: Mapping[str, torch.Tensor],
        began: Mapping[str, int],
        has_extra: bool,
    ) -> None:
        self._name = name
        self._buffers = buffers
        self._began = began
        self.has_extra = has_extra
        holders = holders_of(module)
        self._counting = counting(module, buffers)
        self._watched = [
            Watched(*holders[id(one)], one, local_of(one)) for one in buffers.values() if id(one) in holders
        ]
        self._private: list[TensorItem] = []
        self._unkept: list[TensorItem] = []  # too large to keep a copy of
        self._unchanged: dict[str, tuple[torch.Tensor, int]] = {}  # with the version that was looked at
        self._copies: dict[str, torch.Tensor] = {}  # of what they were in the beginning
        nbytes = 0
        for key, tensor in buffers.items():
            is_looked_at = key in self._counting or local_of(tensor).device.type == "cpu"
            if not is_looked_at or checksum_of(tensor) != began[key]:
                self._private.append(self._item(key, tensor))
                continue
            self._unchanged[key] = (tensor, local_of(tensor)._version)
            nbytes += local_of(tensor).nbytes
            if nbytes <= KEPT_BYTES_MAX:
                self._copies[key] = local_of(tensor).detach().clone()
            else:
                self._unkept.append(item_of(f"{self._name}.{key}", tensor))

    def are_there(self) -> bool:
        """The module still has these very buffers."""
        return all(one.is_there() for one in self._watched)

    def part(self) -> Part:
        for key, (tensor, version) in list(self._unchanged.items()):
            now = local_of(tensor)._version
            if now == version and key in self._counting:
                continue
            if checksum_of(tensor) == self._began[key]:
                self._unchanged[key] = (tensor, now)  # written, but with what it was
                continue
            del self._unchanged[key]
            self._private.append(self._item(key, tensor))
            self._unkept = [item for item in self._unkept if item.spec.key != f"{self._name}.{key}"]
        return Part([*self._private, *self._unkept])

    def put_back(self, private: Container[str]) -> None:
        """At the boundary to go back to, all but `private` (by full key) were as they began: so they are again."""
        for key, copy in self._copies.items():
            local = local_of(self._buffers[key])
            _, version = self._unchanged.get(key, (None, -1))
            is_changed = local._version != version or key not in self._counting
            if is_changed and f"{self._name}.{key}" not in private:
                local.detach().copy_(copy)
                if key in self._unchanged:
                    self._unchanged[key] = (self._buffers[key], local._version)

    def _item(self, key: str, tensor: torch.Tensor) -> TensorItem:
        return item_of(f"{self._name}.{key}", tensor, private=True)


def counting(module: nn.Module, buffers: Mapping[str, torch.Tensor]) -> set[str]:
    """The keys of those buffers whose version counters may be relied on.

    Batch normalization writes its running statistics without counting, and a module of the user's own that calls the
    same functions does so, too.
    """
    norms = {id(one) for part in module.modules() if isinstance(part, _NormBase) for one in part.buffers(recurse=False)}
    return {
        key
        for key, tensor in buffers.items()
        if id(tensor) not in norms
        and (local_of(tensor).device.type != "cpu" or local_of(tensor).nbytes > LOOKED_AT_BYTES_MAX)
    }


def holders_of(module: nn.Module) -> dict[int, tuple[dict[str, Any], str]]:
    """Which dictionary holds each parameter and buffer, and its key there, by the tensor's id."""
    holders: dict[int, tuple[dict[str, Any], str]] = {}
    for one in module.modules():
        for named in (one._parameters, one._buffers):
            for key, tensor in named.items():
                if tensor is not None:
                    holders.setdefault(id(tensor), (named, key))
    return holders


def checksum_of(tensor: torch.Tensor) -> int:
    data = local_of(tensor).detach().cpu().contiguous()
    return _native.crc32c_address(data.data_ptr(), data.nbytes) if data.numel() else 0
