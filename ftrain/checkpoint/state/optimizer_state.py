"""An optimizer's state, by the names of the parameters that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ftrain.checkpoint.state.items import TensorItem, item_of, local_of, torch_dtype
from ftrain.checkpoint.state.part import Part, Saved, Watched, normal
from ftrain.checkpoint.state.saved_optimizer import SavedOptimizer
from ftrain.checkpoint.state.source import TensorInfo
from ftrain.core.plain import Encoded
from ftrain.errors import MismatchedState, UsageError


class OptimizerState:
    """Keys: `<name>.state.<parameter>.<state>`. `parameters` gives the names of all tracked parameters, by id."""

    def __init__(self, name: str, optimizer: Optimizer, parameters: Callable[[], dict[int, str]]) -> None:
        self._name = name
        self._optimizer = optimizer
        self._parameters = parameters
        self._new_options: list[dict[str, Any] | None] = []  # of each group, what `finish` sets
        self._new_state: list[tuple[torch.Tensor, dict[str, Any] | None]] = []  # of parameters; None to have none
        self._plain: dict[str, object] = {}
        self._names: list[Encoded] = []  # of each group's parameters
        self._watched: list[Watched] = []
        self._sizes: list[tuple[Any, int]] = []
        self._values: list[tuple[str, dict[str, Any], str]] = []  # state that is no tensor
        self._own_values: list[tuple[str, dict[str, Any], str]] = []  # the same, for `own`
        self._own_size: tuple[int, int] | None = None

    def part(self) -> Part:
        names = self._find_names()
        part = Part()
        on_cpu: list[str] = []
        order: dict[str, list[str]] = {}
        self._watched, self._values = [], []
        self._sizes = [(self._optimizer.state, len(self._optimizer.state))]
        self._sizes += [(group["params"], len(group["params"])) for group in self._optimizer.param_groups]
        for parameter, state in self._optimizer.state.items():
            name = names[id(parameter)]
            order[name] = list(state)
            self._sizes.append((state, len(state)))
            for key, value in state.items():
                full = f"{self._name}.state.{name}.{key}"
                if isinstance(value, torch.Tensor):
                    part.items.append(item_of(full, value, late=True))
                    self._watched.append(Watched(state, key, value, local_of(value)))
                    if value.device.type == "cpu":
                        on_cpu.append(full)
                else:
                    self._values.append((full, state, key))
        self._names = [
            Encoded([names[id(one)] for one in group["params"]], self._name) for group in self._optimizer.param_groups
        ]
        self._plain = {"order": Encoded(order, self._name), "on_cpu": Encoded(on_cpu, self._name)}
        part.plain = self._plain_now()
        return part

    def plain_if_same(self) -> dict[str, object] | None:
        if len(self._names) != len(self._optimizer.param_groups):
            return None
        if any(len(holder) != size for holder, size in self._sizes):
            return None
        if not all(one.is_there() for one in self._watched):
            return None
        if any(isinstance(state.get(key), torch.Tensor) for _, state, key in self._values):
            return None
        return self._plain_now()

    def prepare(self, plain: Any, saved: Saved) -> list[TensorItem]:
        there = SavedOptimizer(self._name, plain, saved)
        names = self._find_names()
        self._new_options, self._new_state = [], []
        items = []
        for group in self._optimizer.param_groups:
            taken = []
            for parameter in group["params"]:
                name = names[id(parameter)]
                if there.is_wanted(name, tuple(parameter.shape)):
                    items += self._prepare_one(parameter, name, there)
                    taken.append(name)
            self._new_options.append(there.options(taken))
        return items

    def _prepare_one(self, parameter: torch.Tensor, name: str, there: SavedOptimizer) -> list[TensorItem]:
        """The state of one parameter, with tensors where there are none yet. `finish` makes them the optimizer's."""
        order = there.order(name)
        if order is None:
            self._new_state.append((parameter, None))  # a rehearsed step may have made what was not there
            return []
        state = self._optimizer.state.get(parameter, {})
        new: dict[str, Any] = {}
        items = []
        for key in order:
            if there.is_value(name, key):
                new[key] = there.value(name, key)
                continue
            tensor = state.get(key)
            if not isinstance(tensor, torch.Tensor):
                info, on_cpu = there.tensor(name, key, parameter.dtype)
                tensor = new[key] = _fresh(parameter, info, on_cpu)
            items.append(item_of(f"{self._name}.state.{name}.{key}", tensor))
        self._new_state.append((parameter, new))
        return items

    def keep_options(self) -> Callable[[], None]:
        """What puts back the options that there are now, whatever is restored until it is called.

        Where a scheduler has begun from `initial_lr`, the learning rate stays as far along its way as was restored.
        """
        mine = self._options()

        def put_back() -> None:
            for own, found in zip(mine, self._options(), strict=True):
                if own.get("initial_lr") and found.get("initial_lr"):
                    own["lr"] = own["initial_lr"] * (found["lr"] / found["initial_lr"])
            self._set_options(mine)

        return put_back

    def finish(self) -> None:
        for parameter, state in self._new_state:
            if state is None:
                self._optimizer.state.pop(parameter, None)
            else:
                self._optimizer.state[parameter].update(state)
        self._set_options(self._new_options)
        self._new_options, self._new_state = [], []

    @property
    def size(self) -> tuple[int, int]:
        """Parameters with state, and values in their states: where it is the same, so is what they are."""
        states = self._optimizer.state
        return len(states), sum(map(len, states.values()))

    def own(self) -> Part:
        if self.size != self._own_size or any(
            isinstance(state.get(key), torch.Tensor) for _, state, key in self._own_values
        ):
            self._own_values = self._find_values()
            self._own_size = self.size
        values = {full: state[key] for full, state, key in self._own_values}
        return Part(plain={"options": normal(self._options()), "values": normal(values)})

    def take_back(self, plain: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        assert not tensors, "an optimizer has no tensors that are its rank's alone"
        if len(plain["options"]) != len(self._optimizer.param_groups):
            raise MismatchedState(
                f"{self._name}: had {len(plain['options'])} parameter groups, and has "
                f"{len(self._optimizer.param_groups)}; make the optimizer as the run began with it"
            )
        self._set_options(plain["options"])  # as many as there are groups: that was looked at
        for full, state, key in self._find_values():
            if full in plain["values"]:
                state[key] = plain["values"][full]

    def _plain_now(self) -> dict[str, object]:
        pairs = zip(self._names, self._options(), strict=True)
        groups = [{"params": names, "options": options} for names, options in pairs]
        values = {full: state[key] for full, state, key in self._values}
        return {**self._plain, "groups": normal(groups), "values": normal(values)}

    def _options(self) -> list[dict[str, Any]]:
        return [
            {key: _option(value) for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]

    def _set_options(self, options: Sequence[dict[str, Any] | None]) -> None:
        for group, saved in zip(self._optimizer.param_groups, options, strict=False):
            for key, value in (saved or {}).items():
                if isinstance(group.get(key), torch.Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value

    def _find_values(self) -> list[tuple[str, dict[str, Any], str]]:
        """Of all state that is no tensor: its key in a checkpoint, what holds it, and its key there."""
        names = self._find_names()
        return [
            (f"{self._name}.state.{names[id(parameter)]}.{key}", state, key)
            for parameter, state in self._optimizer.state.items()
            for key, value in state.items()
            if not isinstance(value, torch.Tensor)
        ]

    def _find_names(self) -> dict[int, str]:
        known = self._parameters()
        for number, group in enumerate(self._optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    raise UsageError(
                        f"{self._name}: parameter {place} of group {number}, of shape {tuple(parameter.shape)}, "
                        "belongs to no tracked module; track its module too (and make the optimizer after fully_shard)"
                    )
        return known


def _fresh(parameter: torch.Tensor, info: TensorInfo, on_cpu: bool) -> torch.Tensor:
    """A state tensor to be filled: like its parameter where it has that shape, by itself otherwise (a step count)."""
    dtype = torch_dtype(info.dtype)
    if tuple(parameter.shape) == info.shape and (len(info.shape) > 0 or not on_cpu):
        if isinstance(parameter, DTensor):  # an operation on one is worked out anew for each shape
            local = torch.empty_like(local_of(parameter), dtype=dtype, requires_grad=False)
            mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
            placements = parameter.placements
            return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(info.shape, dtype=dtype, device="cpu" if on_cpu else parameter.device)


def _option(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
