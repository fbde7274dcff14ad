"""Optimizers that stand still while a rank does a step alone: what they would change is replaced afterwards.

The first step of a new process's optimizer costs as much as several forward passes, for it makes its state. It is known
of torch's own that a step changes parameters and their own state, takes no random numbers, and does without parameters.
A subclass, one with a closure or with hooks of its own does its step as always.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

_stand_still = False
_emptied: list[tuple[dict[str, Any], list[Any]]] = []  # groups of the optimizer whose step it is, and their parameters


def stand(still: bool) -> None:
    """From now on optimizers are passed over, or are not."""
    global _stand_still
    _stand_still = still
    _give_back()  # of a step that ended with an exception


def passes_over(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a step of it that begins now, with these arguments, writes nothing."""
    return _stand_still and len(args) == 1 and not kwargs and _is_known(optimizer)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if passes_over(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            _emptied.append((group, group["params"]))
            group["params"] = []


def _after_step(*_: Any) -> None:
    _give_back()


def _give_back() -> None:
    while _emptied:
        group, parameters = _emptied.pop()
        group["params"] = parameters


def _is_known(optimizer: Optimizer) -> bool:
    has_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return type(optimizer).__module__.startswith("torch.optim.") and not has_hooks


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
