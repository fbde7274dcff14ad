"""Modules brought round after a step that an exception left in the middle: DDP and FSDP2 go on as the same objects.

All that touches torch's private names about it is here. Where a name is missing, or a state is met that torch gives
no way out of, `Unrecoverable` says so, and the process has to be started anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ftrain.errors import Unrecoverable
from ftrain.worker import groups

# Of gradients that are zero they make zeros, and remember nothing.
HARMLESS_HOOKS = (default_hooks.allreduce_hook, default_hooks.fp16_compress_hook, default_hooks.bf16_compress_hook)

Layout = list[list[int]]  # parameters by their number among those that DDP reduces, bucket by bucket


def recover_modules(modules: Collection[nn.Module], first_step: bool = False) -> None:
    """Let these modules, and those inside, begin a new forward, wherever in a step the last one ended.

    Gradients are dropped, sharded parameters are sharded again, parameter values are left as they are. To be called
    while the groups are local (`groups.rehearse`). `first_step` says that the step to be done next is the first of the
    run, in which DDP has not laid its buckets out yet. Raises `Unrecoverable`.
    """
    assert groups.is_local(), "no peer takes part in the recovery of a module"
    check_recoverable(modules)
    for module in modules:
        with _private_names_of(module):
            for fsdp in _found(module, FSDPModule):
                _recover_fsdp(fsdp)
            for ddp in _found(module, DistributedDataParallel):
                _recover_ddp(ddp, first_step)
        for parameter in module.parameters():
            parameter.grad = None


def check_recoverable(modules: Iterable[nn.Module]) -> None:
    """Raises `Unrecoverable` for what `recover_modules` has no way for, wherever in a step it is."""
    for module in modules:
        with _private_names_of(module):
            for ddp in _found(module, DistributedDataParallel):
                if ddp.static_graph:
                    raise Unrecoverable(
                        "DDP with static_graph=True keeps counts of its first iteration that a failure spoils"
                    )
                if _has_lost_its_layout(ddp):
                    _check_layable(ddp)


def settle_buckets(modules: Iterable[nn.Module]) -> None:
    """Let DDP lay its buckets out as in its second iteration, by the step that was rehearsed just now.

    DDP would do it at its next forward, with a broadcast that peers in later iterations do not take part in. To be
    called while the groups are local. Raises `Unrecoverable`.
    """
    assert groups.is_local(), "peers that are past their second iteration take no part in this"
    for module in modules:
        with _private_names_of(module):
            for ddp in _found(module, DistributedDataParallel):
                _settle(ddp)


def bucket_layouts(modules: Iterable[nn.Module]) -> list[Layout | None]:
    """How each DDP module has laid its buckets out; None for one that has not yet, or never does."""
    layouts: list[Layout | None] = []
    for module in modules:
        with _private_names_of(module):
            layouts += [
                _layout(ddp) if ddp._has_rebuilt_buckets else None for ddp in _found(module, DistributedDataParallel)
            ]
    return layouts


def lay_out_buckets(modules: Iterable[nn.Module], layouts: Sequence[Layout | None]) -> None:
    """Give each DDP module the layout that `bucket_layouts` said at a peer, so that sums add in the same order.

    No step needs to be rehearsed for it. To be called while the groups are local. Raises `Unrecoverable`.
    """
    assert groups.is_local(), "peers that have laid out their buckets take no part in this"
    found = [ddp for module in modules for ddp in _found(module, DistributedDataParallel)]
    if len(found) != len(layouts):
        raise Unrecoverable(f"a peer has {len(layouts)} DDP modules, this rank has {len(found)}")
    for ddp, layout in zip(found, layouts, strict=True):
        if layout is not None:
            with _private_names_of(ddp):
                _lay_out(ddp, layout)


def _found(module: nn.Module, kind: type[Any]) -> Iterator[Any]:
    return (one for one in module.modules() if isinstance(one, kind))


class _private_names_of:  # noqa: N801  # reads as the statement that it begins
    """Turns the AttributeError of a name that this torch lacks into `Unrecoverable`."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _found: object) -> None:
        if isinstance(error, AttributeError):
            raise Unrecoverable(
                f"torch {torch.__version__} has no way to bring {type(self._module).__name__} round after a failure "
                f"({error}): start this rank anew"
            ) from error


def _recover_fsdp(module: Any) -> None:
    state = module._get_fsdp_state()
    for group in state._fsdp_param_groups:
        group._all_gather_result = None  # its work failed, and would be waited for
        for parameter in group.fsdp_params:
            unsharded = getattr(parameter, "_unsharded_param", None)  # made at the first gathering
            if unsharded is not None:
                unsharded.grad = None
            parameter.unsharded_accumulated_grad = None
            parameter.sharded_param.grad = None
    if state._is_root is not False:  # None before the first forward
        module.reset_iter_state()


def _recover_ddp(ddp: Any, first_step: bool) -> None:
    reducer = ddp.reducer
    if ddp.find_unused_parameters:
        reducer._reset_state()  # it also forgets which parameters were used; such a DDP never lays out its buckets
    elif not ddp._has_rebuilt_buckets:
        if first_step or not _finished(reducer):
            reducer._reset_state()
        elif reducer._rebuild_buckets():  # the failure came between the first iteration and the second's broadcast
            ddp._has_rebuilt_buckets = True
    elif _has_lost_its_layout(ddp):
        # Only a reset ends the backward that was begun, but it would also lay the buckets out once more, with peers.
        layout = _layout(ddp)
        reducer._reset_state()
        _lay_out(ddp, layout)


def _has_lost_its_layout(ddp: Any) -> bool:
    """Whether it has to be given its buckets anew: nothing but a reset ends the backward that it is in."""
    return not ddp.find_unused_parameters and ddp._has_rebuilt_buckets and not _finished(ddp.reducer)


def _check_layable(ddp: Any) -> None:
    if ddp.mixed_precision is not None or any(hook not in HARMLESS_HOOKS for hook, _ in ddp._comm_hooks):
        raise Unrecoverable(
            "DDP with mixed_precision, or with a communication hook that may remember what it has seen, would run it "
            "on gradients of zero"
        )


def _finished(reducer: Any) -> bool:
    """Whether no backward is half done."""
    try:
        reducer._check_reducer_finalized()
    except RuntimeError:
        return False
    return True


def _settle(ddp: Any) -> None:
    if not ddp._has_rebuilt_buckets and ddp.reducer._rebuild_buckets():
        ddp._has_rebuilt_buckets = True


def _reduced(ddp: Any) -> list[torch.Tensor]:
    """The parameters that the reducer has, by its numbers."""
    parameters, _ = ddp._build_params_for_reducer()
    return list(parameters)


def _layout(ddp: Any) -> Layout:
    numbers = {id(parameter): number for number, parameter in enumerate(_reduced(ddp))}
    return [
        [numbers[id(parameter)] for parameter in bucket.parameters()]
        for bucket in ddp.reducer._get_zeros_like_grad_buckets()
    ]


def _lay_out(ddp: Any, layout: Layout) -> None:
    """Go through a backward in which the gradients, all zero, become ready in the order of the layout."""
    reducer = ddp.reducer
    parameters = _reduced(ddp)
    if sorted(number for bucket in layout for number in bucket) != list(range(len(parameters))):
        raise Unrecoverable(f"the layout of a peer is not one of the {len(parameters)} parameters of this DDP module")
    _check_layable(ddp)

    def begin(_gradient: torch.Tensor) -> None:
        for bucket in layout:
            for number in bucket:
                reducer._autograd_hook(number)

    start = torch.zeros((), requires_grad=True)
    start.register_hook(begin)  # type: ignore[no-untyped-call]
    ddp._has_rebuilt_buckets = False
    reducer.prepare_for_backward([])
    start.backward()  # type: ignore[no-untyped-call]
    _settle(ddp)
    for parameter in parameters:
        parameter.grad = None
    if not ddp._has_rebuilt_buckets or _layout(ddp) != layout:
        raise Unrecoverable("DDP has not taken the layout of a peer's buckets")
