"""The form of an operator's result, where it is known without trying: DTensor tries each operator that is new to it.

It does so on fake tensors, once for each operator and each shape, in 3 to 10 ms: that is most of what `fully_shard` and
the first step of an optimizer take in a new process, and its peers wait. All that touches torch's private names about
it is here; where one is missing, torch tries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

_TRIES = "_propagate_tensor_meta_non_cached"
_Ask = Callable[[Any, Any], Any]  # (propagator, operator with its arguments) -> the form of its result

_aten = torch.ops.aten
UNKNOWN: Final = object()  # None is a form: that of no result
# Of one contiguous tensor of floats, or a list of them, and numbers, these make another of the same form.
KEEPING = frozenset(
    {
        _aten.detach.default,
        _aten.sqrt.default,
        _aten.div.Tensor,
        _aten.mul.Tensor,
        _aten._foreach_sqrt.default,
        _aten._foreach_div.Scalar,
        _aten._foreach_div.ScalarList,
        _aten._foreach_mul.Scalar,
    }
)


def use() -> None:
    """From now on in this process. Again without effect."""
    try:
        from torch.distributed.tensor._sharding_prop import ShardingPropagator
    except ImportError:
        return
    tries: _Ask | None = getattr(ShardingPropagator, _TRIES, None)
    if tries is not None and not hasattr(tries, "__wrapped__"):
        setattr(ShardingPropagator, _TRIES, _unless_known(tries))


def _unless_known(tries: _Ask) -> _Ask:
    @functools.wraps(tries)
    def ask(propagator: Any, schema: Any) -> Any:
        try:
            known = known_form(schema)
        except AttributeError:  # of a torch that says these things in another way
            known = UNKNOWN
        return tries(propagator, schema) if known is UNKNOWN else known

    return ask


def known_form(schema: Any) -> object:
    """Of what an operator with its arguments, a torch `OpSchema`, gives: a `TensorMeta`, a list of them, None; UNKNOWN.

    Where tensors are changed in place, element by element, the result is the first as it was, or nothing for lists of
    tensors. Arguments that may not fit are for torch to try: whoever is refused is to hear of it from there.
    """
    operator, arguments = schema.op, schema.args_schema
    forms = _forms(arguments[0]) if arguments else None
    if not forms:
        return UNKNOWN
    if _is_written(operator._schema.arguments[0]):
        if not all(_fits(other, forms) for other in arguments[1:]):
            return UNKNOWN
        if isinstance(arguments[0], Sequence):
            return None if not operator._schema.returns else UNKNOWN
        return forms[0] if torch.Tag.pointwise in operator.tags else UNKNOWN
    if operator in KEEPING and all(map(_is_number, arguments[1:])) and all(map(_is_plain, forms)):
        return forms if isinstance(arguments[0], Sequence) else forms[0]
    return UNKNOWN


def _forms(argument: object) -> list[Any] | None:
    """Of a tensor, or of each of a list; None where one is none."""
    forms = [getattr(one, "tensor_meta", None) for one in _each(argument)]
    return None if None in forms else forms


def _fits(argument: object, forms: Sequence[Any]) -> bool:
    """Whether it is a number, a tensor or a list for each of these, of the same shape or a single number."""
    if _is_number(argument):
        return True
    others = _forms(argument)
    if others is None or (isinstance(argument, Sequence) and len(others) not in (0, len(forms))):
        return False
    return all(not other.shape or other.shape == form.shape for other, form in zip(others, forms, strict=False))


def _is_number(argument: object) -> bool:
    """Or a list of numbers."""
    return all(isinstance(one, int | float) for one in _each(argument))


def _each(argument: object) -> Sequence[object]:
    return argument if isinstance(argument, Sequence) else [argument]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _is_plain(form: Any) -> bool:
    """Floats, element after element."""
    return bool(form.dtype.is_floating_point and torch.empty(form.shape, device="meta").stride() == form.stride)
