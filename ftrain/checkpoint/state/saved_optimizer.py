"""An optimizer's state in a checkpoint, looked up by the parameters' names of here.

Ranks that hold different parameters (stages of a pipeline) each say what they know, so what one rank has not is looked
for with the others. Parameter groups may be cut in another way than they were: options follow the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftrain.checkpoint.state.items import dtype_name
from ftrain.checkpoint.state.part import Saved
from ftrain.checkpoint.state.source import TensorInfo
from ftrain.errors import MismatchedState

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Said:
    """The plain data of one rank, by the names that things were saved under."""

    order: Mapping[str, list[str]]  # of each parameter with state, the names of that
    values: Mapping[str, Any]  # state that is no tensor, by key
    on_cpu: frozenset[str]  # keys of state
    options: list[dict[str, Any]]  # of each group


@dataclass(frozen=True, slots=True)
class _Parameter:
    """What a rank says of one parameter. `saved` is its name in the checkpoint."""

    saved: str
    said: _Said
    group: int


class SavedOptimizer:
    """What `plain`, the plain data of one rank, and that of the others say of the optimizer `name`."""

    def __init__(self, name: str, plain: Any, saved: Saved) -> None:
        self._name = name
        self._saved = saved
        self._known: dict[str, _Parameter] = {}
        self._others = saved.others() if plain is not None else iter(())
        if plain is not None:
            self._learn(plain)

    def is_wanted(self, parameter: str, shape: tuple[int, ...]) -> bool:
        """Whether this parameter's state is to be restored. Notes it as missing where it should be and is not there.

        The state goes the way of its parameter: it stays as it is where that has another shape by now.
        """
        terms = self._saved.terms
        if not (terms.wants(parameter) or terms.wants(f"{self._name}.state.{parameter}")):
            return False
        if self._find(parameter) is None:
            self._saved.missing.append(f"{self._name}.state.{parameter}")
            return False
        info = self._saved.shared.get(parameter)
        return info is None or info.shape == shape

    def order(self, parameter: str) -> list[str] | None:
        """The names of its state; None where it had none yet."""
        found = self._known[parameter]
        order = found.said.order.get(found.saved)
        return None if order is None else list(order)

    def is_value(self, parameter: str, key: str) -> bool:
        """Whether this part of its state is plain data rather than a tensor."""
        found = self._known[parameter]
        return self._full(found, key) in found.said.values

    def value(self, parameter: str, key: str) -> Any:
        found = self._known[parameter]
        return found.said.values[self._full(found, key)]

    def tensor(self, parameter: str, key: str, dtype: torch.dtype) -> tuple[TensorInfo, bool]:
        """What a new tensor for this part of its state has to be, and whether it lay on the CPU.

        Where tensors may be converted, what was of its parameter's shape and dtype is of the parameter's `dtype` of
        here. Raises `MismatchedState` where the checkpoint has no such tensor.
        """
        found = self._known[parameter]
        full = f"{self._name}.state.{parameter}.{key}"
        info = self._saved.shared.get(full)
        if info is None:
            raise MismatchedState(f"{full}: the checkpoint names this tensor but does not hold it")
        of = self._saved.shared.get(parameter)
        if self._saved.terms.casts and info.shape and of == info:
            info = TensorInfo(dtype_name(dtype), info.shape)
        return info, self._full(found, key) in found.said.on_cpu

    def options(self, parameters: Sequence[str]) -> dict[str, Any] | None:
        """The options of the group that these parameters are in here; None where there are none of them.

        Raises `MismatchedState` where they were in groups with different options.
        """
        chosen: dict[str, Any] | None = None
        first = ""
        for parameter in parameters:
            found = self._known[parameter]
            options = found.said.options[found.group]
            if chosen is None:
                chosen, first = options, parameter
            elif options is not chosen and options != chosen:
                odd = next((key for key in options if options[key] != chosen.get(key)), "the number of options")
                raise MismatchedState(
                    f"{self._name}: {first} and {parameter} are in one parameter group here, but were saved in groups "
                    f"with different options ({odd}); make the groups as they were, or load without the optimizer"
                )
        return chosen

    def _find(self, parameter: str) -> _Parameter | None:
        while parameter not in self._known:
            other = next(self._others, None)
            if other is None:
                return None
            self._learn(other)
        return self._known[parameter]

    def _learn(self, plain: Any) -> None:
        if "groups" not in plain:
            raise MismatchedState(f"{self._name}: the checkpoint has no optimizer under this name, but something else")
        groups = plain["groups"]
        options = [group["options"] for group in groups]
        said = _Said(plain["order"], plain["values"], frozenset(plain["on_cpu"]), options)
        for number, group in enumerate(groups):
            for name in group["params"]:
                self._known.setdefault(self._saved.terms.here(name), _Parameter(name, said, number))

    def _full(self, parameter: _Parameter, key: str) -> str:
        return f"{self._saved.name}.state.{parameter.saved}.{key}"
