"""What a run tracks, as tensors and plain data, and back.

Keys: `<name>.<parameter>` for a module, `<name>.state.<parameter>.<state>` for an optimizer, `<name>.<path>` for
tensors in anything else's `state_dict`. Parameters and optimizer state are shared: replicated or sharded as their
DTensor says, written once. A buffer that this rank has changed since it was tracked is saved for this rank as well.
Everything else belongs to its rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ftrain.checkpoint.items import TensorItem, item_of, torch_dtype
from ftrain.checkpoint.restore import Checkpoint, TensorInfo
from ftrain.core import plain as plain_data
from ftrain.errors import MismatchedState, UsageError

COMPILED = "_orig_mod."


@runtime_checkable
class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass(slots=True)
class Part:
    """What one tracked object gives: tensors, and plain data for this rank."""

    items: list[TensorItem] = field(default_factory=list)
    plain: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Saved:
    """The tensors of a checkpoint, by key: those that all ranks share, and this rank's own."""

    shared: Mapping[str, TensorInfo]
    private: Mapping[str, TensorInfo]


class Tracked:
    """All objects of a run, by name."""

    def __init__(self) -> None:
        self._objects: dict[str, _Module | _Optimizer | _Other] = {}

    def add(self, name: str, found: object) -> None:
        """Raises `UsageError` for a name that is taken or not one, and for an object without state; `NotPlainData`."""
        if name in self._objects:
            raise UsageError(f"track({name}=…): something is tracked under this name already")
        if not name.isidentifier():
            raise UsageError(f"track({name!r}): a name has letters, digits and underscores only")
        if isinstance(found, nn.Module):
            if any(isinstance(one, FullyShardedDataParallel) for one in found.modules()):
                raise UsageError(f"track({name}=…): FullyShardedDataParallel is not supported; use fully_shard (FSDP2)")
            self._objects[name] = _Module(name, found)
        elif isinstance(found, Optimizer):
            self._objects[name] = _Optimizer(name, found, self)
        elif isinstance(found, Stateful):
            self._objects[name] = _Other(name, found)
        else:
            raise UsageError(
                f"track({name}=…): a {type(found).__name__} has no state_dict and load_state_dict; "
                "give a module, an optimizer, or an object that has both"
            )

    def check(self) -> None:
        """Find out now what could not be saved later. Raises `NotPlainData` or `UsageError` naming the key."""
        for name, one in self._objects.items():
            plain_data.encode(one.part().plain, name)

    def collect(self) -> Part:
        whole = Part()
        for name, one in self._objects.items():
            part = one.part()
            whole.items += part.items
            whole.plain[name] = part.plain
        return whole

    def restore(self, checkpoint: Checkpoint, rank: int, source: int) -> None:
        """Put the state of a checkpoint back, in place. `source` is the rank whose private state this rank takes."""
        plain: Any = checkpoint.plain(source)["tracked"]
        for name in self._objects:
            if name not in plain:
                raise MismatchedState(
                    f"the checkpoint has nothing tracked as {name!r}: it has {', '.join(sorted(plain))}"
                )
        saved = Saved(checkpoint.tensors, checkpoint.private_tensors(source))
        shared: list[TensorItem] = []
        own: list[TensorItem] = []
        for name, one in self._objects.items():
            items = one.prepare(plain[name], saved)
            shared += [item for item in items if not item.spec.private]
            own += [item for item in items if item.spec.private]
        checkpoint.read_into(shared, rank)
        if own:
            # What the rank kept for itself wins over what all share.
            checkpoint.read_into(own, source, elsewhere=[item.spec.key for item in shared])
        for one in self._objects.values():
            one.finish()

    @property
    def rebuilds_buckets(self) -> bool:
        """Whether a module is replicated by DDP, which lays its buckets out anew after its first iteration."""
        return any(isinstance(one, _Module) and one.replicated for one in self._objects.values())

    def parameters(self) -> dict[int, str]:
        """Parameter name by object, over all tracked modules."""
        return {
            id(tensor): f"{name}.{key}"
            for name, one in self._objects.items()
            if isinstance(one, _Module)
            for key, tensor in one.tensors()
        }


class _Module:
    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self._module = _unwrapped(module)
        self.replicated = isinstance(module, DistributedDataParallel) or isinstance(
            getattr(module, "_orig_mod", None), DistributedDataParallel
        )
        buffers = {id(buffer) for buffer in self._module.buffers()}
        self._buffers = {key for key, tensor in self.tensors() if id(tensor) in buffers}
        self._began = {key: _checksum(tensor) for key, tensor in self.tensors() if key in self._buffers}
        self._extra: dict[str, Any] = {}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and persistent buffers, each once however often it is tied."""
        seen: set[int] = set()
        for key, value in self._module.state_dict(keep_vars=True).items():
            if isinstance(value, torch.Tensor) and id(value) not in seen:
                seen.add(id(value))
                yield _clean(key), value

    def part(self) -> Part:
        part = Part()
        for key, tensor in self.tensors():
            part.items.append(item_of(f"{self._name}.{key}", tensor))
            if key in self._buffers and _checksum(tensor) != self._began[key]:
                part.items.append(item_of(f"{self._name}.{key}", tensor, private=True))
        extra = {
            _clean(key): value
            for key, value in self._module.state_dict().items()
            if not isinstance(value, torch.Tensor)
        }
        part.plain["extra"] = _normal(extra)
        return part

    def prepare(self, plain: Any, saved: Saved) -> list[TensorItem]:
        self._extra = plain["extra"]
        items = []
        for key, tensor in self.tensors():
            full = f"{self._name}.{key}"
            items.append(item_of(full, tensor))
            if full in saved.private:
                items.append(item_of(full, tensor, private=True))
        return items

    def finish(self) -> None:
        for parameter in self._module.parameters():
            parameter.grad = None  # a rehearsed step may have left some
        if self._extra:
            self._module.load_state_dict(self._extra, strict=False)
        self._extra = {}


class _Optimizer:
    def __init__(self, name: str, optimizer: Optimizer, tracked: Tracked) -> None:
        self._name = name
        self._optimizer = optimizer
        self._tracked = tracked
        self._plain: dict[str, Any] = {}

    def part(self) -> Part:
        names = self._names()
        part = Part()
        values: dict[str, object] = {}
        on_cpu: list[str] = []
        order: dict[str, list[str]] = {}
        for parameter, state in self._optimizer.state.items():
            name = names[id(parameter)]
            order[name] = list(state)
            for key, value in state.items():
                full = f"{self._name}.state.{name}.{key}"
                if isinstance(value, torch.Tensor):
                    part.items.append(item_of(full, value))
                    if value.device.type == "cpu":
                        on_cpu.append(full)
                else:
                    values[full] = value
        groups = [
            {
                "params": [names[id(parameter)] for parameter in group["params"]],
                "options": {key: _option(value) for key, value in group.items() if key != "params"},
            }
            for group in self._optimizer.param_groups
        ]
        part.plain = {"groups": _normal(groups), "order": order, "values": _normal(values), "on_cpu": on_cpu}
        return part

    def prepare(self, plain: Any, saved: Saved) -> list[TensorItem]:
        self._plain = plain
        names = self._names()
        on_cpu = set(plain["on_cpu"])
        items = []
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                if name not in plain["order"]:
                    self._optimizer.state.pop(parameter, None)  # a rehearsed step may have made what was not there
                    continue
                state = self._optimizer.state[parameter]
                for key in plain["order"][name]:
                    full = f"{self._name}.state.{name}.{key}"
                    if full in plain["values"]:
                        state[key] = plain["values"][full]
                        continue
                    if full not in saved.shared:
                        raise MismatchedState(f"{full}: the checkpoint names this tensor but does not hold it")
                    if not isinstance(state.get(key), torch.Tensor):
                        state[key] = _fresh(parameter, saved.shared[full], full in on_cpu)
                    items.append(item_of(full, state[key]))
        return items

    def finish(self) -> None:
        names = self._names()
        groups = self._plain["groups"]
        if [group["params"] for group in groups] != [
            [names[id(parameter)] for parameter in group["params"]] for group in self._optimizer.param_groups
        ]:
            raise MismatchedState(f"{self._name}: the checkpoint's parameter groups hold other parameters")
        for group, saved in zip(self._optimizer.param_groups, groups, strict=True):
            for key, value in saved["options"].items():
                if isinstance(group.get(key), torch.Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value
        self._plain = {}

    def _names(self) -> dict[int, str]:
        known = self._tracked.parameters()
        for number, group in enumerate(self._optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    raise UsageError(
                        f"{self._name}: parameter {place} of group {number}, of shape {tuple(parameter.shape)}, "
                        "belongs to no tracked module; track its module too (and make the optimizer after fully_shard)"
                    )
        return known


class _Other:
    def __init__(self, name: str, found: Stateful) -> None:
        self._name = name
        self._found = found
        self._state: Any = None

    def part(self) -> Part:
        part = Part()
        part.plain["state"] = self._flatten(self._found.state_dict(), self._name, part.items)
        return part

    def prepare(self, plain: Any, saved: Saved) -> list[TensorItem]:
        items: list[TensorItem] = []
        self._state = _unflatten(plain["state"], saved.private, items)
        return items

    def finish(self) -> None:
        self._found.load_state_dict(self._state)
        self._state = None

    def _flatten(self, value: Any, path: str, items: list[TensorItem]) -> object:
        """Plain data in which a tensor has become a note of its key."""
        if isinstance(value, torch.Tensor):
            items.append(item_of(path, value, private=True))
            return {"tensor": path, "device": value.device.type}
        if isinstance(value, dict):
            return {"dict": [(key, self._flatten(one, f"{path}.{key}", items)) for key, one in value.items()]}
        if isinstance(value, (list, tuple)):
            parts = [self._flatten(one, f"{path}.{place}", items) for place, one in enumerate(value)]
            return {"list" if isinstance(value, list) else "tuple": parts}
        leaf = _normal(value)
        plain_data.encode(leaf, path)  # here the path is still the one that the user knows
        return {"value": leaf}


def _unflatten(node: Any, private: Mapping[str, TensorInfo], items: list[TensorItem]) -> Any:
    if "tensor" in node:
        info = private.get(node["tensor"])
        if info is None:
            raise MismatchedState(f"{node['tensor']}: the checkpoint names this tensor but does not hold it")
        tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        if node["device"] == "cuda" and torch.cuda.is_available():
            tensor = tensor.cuda()
        items.append(item_of(node["tensor"], tensor, private=True))
        return tensor
    if "dict" in node:
        return {key: _unflatten(one, private, items) for key, one in node["dict"]}
    if "list" in node:
        return [_unflatten(one, private, items) for one in node["list"]]
    if "tuple" in node:
        return tuple(_unflatten(one, private, items) for one in node["tuple"])
    return node["value"]


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


def _checksum(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    data = local.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(data.numpy().data)


def _fresh(parameter: torch.Tensor, info: TensorInfo, on_cpu: bool) -> torch.Tensor:
    """An empty state tensor: like its parameter where it has that shape, by itself otherwise (a step count)."""
    dtype = torch_dtype(info.dtype)
    if tuple(parameter.shape) == info.shape and (len(info.shape) > 0 or not on_cpu):
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(info.shape, dtype=dtype, device="cpu" if on_cpu else parameter.device)


def _option(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _normal(value: Any) -> Any:
    """Plain types for their subclasses: what PyTorch's own objects put into their state."""
    if isinstance(value, dict):
        return {key: _normal(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_normal(one) for one in value]
    if isinstance(value, tuple):
        return tuple(_normal(one) for one in value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    return value
