"""Looks at tensors: what they see has changed, and what they cannot tell."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
import torch

from ftrain import _native
from ftrain.checkpoint.staging import look as looks
from ftrain.checkpoint.staging.look import PLAIN, host_addresses, is_unchanged, look, quick_look, versions

needs_exchange = pytest.mark.skipif(
    looks._exchange is None, reason="this torch tells nothing about many tensors at once"
)


@pytest.fixture(params=["quick", "one by one"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "one by one":
        monkeypatch.setattr(looks, "_exchange", None)
        monkeypatch.setattr(looks, "_version", property(lambda _: None))
    return str(request.param)


def tensors() -> list[torch.Tensor]:
    return [
        torch.arange(12.0).reshape(3, 4),
        torch.nn.Parameter(torch.ones(5)),
        torch.zeros(0, 3),
        torch.tensor(1.5),
        torch.zeros(6, dtype=torch.bfloat16),
        torch.ones(4).to(torch.float8_e4m3fn),
        torch.tensor([True]),
    ]


def test_tensors_that_only_got_other_contents_are_unchanged() -> None:
    some = tensors()
    before = look(some)
    some[0].add_(1)
    assert is_unchanged(some, look(some), before)
    assert is_unchanged(some, look(some, before), before)
    assert not is_unchanged(some, before, None)


def _move(some: list[torch.Tensor]) -> None:
    some[0].data = torch.zeros(3, 4)


def _turn(some: list[torch.Tensor]) -> None:
    some[0].t_()


def _flatten(some: list[torch.Tensor]) -> None:
    some[0].resize_(12)


def _retype(some: list[torch.Tensor]) -> None:
    some[1] = some[1].data.view(torch.int32)


def _swap(some: list[torch.Tensor]) -> None:
    some[0], some[1] = some[1], some[0]


def _shorten(some: list[torch.Tensor]) -> None:
    some.pop()


@pytest.mark.parametrize("change", [_move, _turn, _flatten, _retype, _swap, _shorten])
def test_tensors_that_moved_or_took_another_form_are_not_unchanged(
    change: Callable[[list[torch.Tensor]], None],
) -> None:
    some = tensors()
    held, before = list(some), look(some)
    change(some)
    assert not is_unchanged(some, look(some, before), before)
    assert held


def test_other_objects_with_the_same_memory_are_unchanged() -> None:
    some = tensors()
    views = [tensor.detach() for tensor in some]
    assert is_unchanged(views, look(views), look([tensor.detach() for tensor in some])) or looks._exchange is None


def test_another_view_of_the_same_memory_that_means_other_values_is_not_unchanged() -> None:
    whole = torch.tensor([1 + 2j])
    for one, other in ((whole, whole.conj()), (whole.imag, whole.conj().imag)):
        assert not is_unchanged([other], look([other]), look([one]))


@needs_exchange
@pytest.mark.parametrize(
    "strange",
    [torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.complex64), "no tensor"],
    ids=["sparse", "meta", "complex", "none"],
)
def test_what_is_no_dense_plain_tensor_is_not_looked_at_quickly(strange: torch.Tensor) -> None:
    assert quick_look([torch.zeros(2), strange]) is None


def test_versions_count_what_was_done_in_place() -> None:
    some = tensors()
    before = versions(some)
    assert versions(some, look(some)) == before
    some[1].data.add_(1)
    assert versions(some) == before  # as documented: `data` does not count
    some[3].add_(1)
    assert versions(some) != before


def test_versions_of_tensors_without_any_are_refused() -> None:
    with torch.inference_mode():
        some = [torch.zeros(2)]
    with pytest.raises(RuntimeError, match="version counter"):
        versions(some)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="not the descriptor"):
        _native.counters([torch.zeros(1)], torch.Tensor.data_ptr)
    with pytest.raises(TypeError, match="another type"):
        _native.counters([1], vars(torch._C.TensorBase)["_version"])
    with pytest.raises(ValueError, match="Capsule"):
        _native.look([], PLAIN, "no capsule")
    with pytest.raises(ValueError, match="differ in length"):
        _native.find_anatomy([torch.zeros(1)], [], [0])


def test_addresses_are_given_where_all_lie_in_host_memory_as_in_a_file() -> None:
    some = tensors()
    found = host_addresses(some)
    assert found is not None
    assert list(found) == [tensor.data_ptr() for tensor in some]
    assert host_addresses([]) == array("Q")
    views = [torch.arange(4.0)[1:], torch.zeros(5, 1)[::2, :], torch.zeros(0, 3).t(), torch.zeros(1, 4).t()]
    for number, view in enumerate(views):
        assert (host_addresses([view]) is not None) == view.is_contiguous(), number


@pytest.mark.parametrize(
    "strange",
    [
        torch.zeros(3, 4).t(),
        torch.ones(3).expand(2, 3),
        torch.ones(1, dtype=torch.complex64).conj(),
        torch.ones(4)[::2],
    ],
)
def test_no_addresses_are_given_where_one_lies_in_another_way(strange: torch.Tensor) -> None:
    assert host_addresses([torch.zeros(1), strange]) is None
    negative = torch.ones(1, dtype=torch.complex64).conj().imag
    assert host_addresses([negative]) is None
