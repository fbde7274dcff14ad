"""What a newcomer knows of operators' results is what torch finds out by trying them, or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, _sharding_prop, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from ftrain.worker import known_forms
from ftrain.worker.known_forms import UNKNOWN

SIZE = 2  # ranks, of which only this one is there: no tensor is moved, only forms are asked for
Propagator = _sharding_prop.ShardingPropagator
NAME = "_propagate_tensor_meta_non_cached"
TRIES: Callable[[Any, Any], Any] = getattr(Propagator, NAME)
SHAPES = ((7, 3), (8,), (1,), (5, 1, 2), (4, 0), ())
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "adamw": lambda given: torch.optim.AdamW(given, foreach=False),
    "adamw, fused": lambda given: torch.optim.AdamW(given, fused=True),
    "adamw, foreach": lambda given: torch.optim.AdamW(given, foreach=True),
    "amsgrad": lambda given: torch.optim.Adam(given, amsgrad=True, weight_decay=0.1, foreach=False),
    "sgd": lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False),
    "rmsprop": lambda given: torch.optim.RMSprop(given, centered=True, momentum=0.1, foreach=False),
    "adagrad": lambda given: torch.optim.Adagrad(given, lr_decay=0.1, foreach=False),
    "adamax": lambda given: torch.optim.Adamax(given, foreach=False),
}


@pytest.fixture(autouse=True)
def _mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two ranks, no form known to torch beforehand, and its own way of trying at the end."""
    monkeypatch.setattr(Propagator, NAME, TRIES)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=SIZE)
    _forget()
    yield
    dist.destroy_process_group()
    _forget()


def _forget() -> None:
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    torch._C._clear_DTensor_sharding_propagator_cache()  # type: ignore[attr-defined]


def _tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """(operator with its arguments, form of its result) of each that torch tries from now on."""
    tried: list[tuple[Any, Any]] = []

    def trying(propagator: Any, schema: Any) -> Any:
        form = TRIES(propagator, schema)
        tried.append((schema, form))
        return form

    monkeypatch.setattr(Propagator, NAME, trying)
    return tried


def _distributed(shape: tuple[int, ...], dtype: torch.dtype) -> DTensor:
    mesh = init_device_mesh("cpu", (SIZE,))
    whole = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32).to(dtype).reshape(shape)
    return distribute_tensor(whole, mesh, [Shard(0) if shape else Replicate()], src_data_rank=None)


def _train(name: str, dtype: torch.dtype, steps: int = 2) -> list[Tensor]:
    parameters: list[Tensor] = [torch.nn.Parameter(_distributed(shape, dtype)) for shape in SHAPES]
    optimizer = OPTIMIZERS[name](parameters)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = parameter.detach() / 3
        optimizer.step()
    return [one.to_local() for one in parameters if isinstance(one, DTensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_known_is_what_torch_finds(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    tried = _tried(monkeypatch)
    _train(name, dtype)
    known = [(known_forms.known_form(schema), form, schema) for schema, form in tried]
    assert [str(schema) for mine, form, schema in known if mine is not UNKNOWN and mine != form] == []
    if name.startswith("adamw"):
        tried_still = {str(schema.op) for mine, _, schema in known if mine is UNKNOWN}
        assert tried_still <= {"aten.zeros_like.default", "aten.div.Tensor"}, "what each newcomer's peers wait for"


@pytest.mark.parametrize(
    "ask",
    [
        lambda one: one > 2,
        lambda one: one.transpose(0, 1).sqrt(),
        lambda one: one.long().mul(2),
        lambda one: one.long().div(2),
        lambda one: one.long().sqrt(),
        lambda one: one.to(torch.complex64).mul_(2),
        lambda one: one.mul(1j),
        lambda one: torch.isnan(one),
        lambda one: one.t().add_(1),
        lambda one: one.clone().mul_(one[:1]),
        lambda one: torch._foreach_add_([one.clone()], [one[:1]]),
        lambda one: torch._foreach_mul([one.long()], 2.5),
    ],
)
def test_other_types_and_orders_are_as_torch_finds(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[DTensor], object]
) -> None:
    matrix = _distributed((6, 4), torch.float32)
    tried = _tried(monkeypatch)
    ask(matrix)
    assert tried
    for schema, form in tried:
        assert known_forms.known_form(schema) in (UNKNOWN, form), str(schema)


def test_training_is_the_same_bit_by_bit_with_hardly_a_try(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _train("adamw", torch.float32, steps=3)
    _forget()
    tried = _tried(monkeypatch)
    known_forms.use()
    known_forms.use()
    found = _train("adamw", torch.float32, steps=3)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert set(Counter(str(schema.op) for schema, _ in tried)) == {"aten.zeros_like.default"}


@pytest.mark.parametrize(
    "change", [lambda one, other: one.add_(other), lambda *both: torch._foreach_add_(*([one] for one in both))]
)
def test_what_may_not_fit_is_tried(monkeypatch: pytest.MonkeyPatch, change: Callable[..., object]) -> None:
    row = distribute_tensor(torch.ones(1, 2), init_device_mesh("cpu", (SIZE,)), [Replicate()], src_data_rank=None)
    rows = _distributed((SIZE, 2), torch.float32)  # of which the part that is here would fit

    def trying(_propagator: object, schema: Any) -> None:
        raise RuntimeError(f"tried {schema.op}")

    monkeypatch.setattr(Propagator, NAME, trying)
    known_forms.use()
    with pytest.raises(RuntimeError, match="tried aten"):
        change(row, rows)


def test_a_torch_that_has_other_names_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        op = torch.ops.aten.sqrt.default

    tries: Any = lambda *_: "tried"  # noqa: E731
    monkeypatch.setattr(Propagator, NAME, tries)
    known_forms.use()
    assert getattr(Propagator, NAME)(Propagator(), Other()) == "tried"
    monkeypatch.delattr(Propagator, NAME)
    known_forms.use()
