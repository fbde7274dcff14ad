"""From a state to what is saved of it: what is remembered from one time to the next, and what ends that."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ftrain.checkpoint.staging import look as looks
from ftrain.checkpoint.writing.job import Jobs
from ftrain.errors import UsageError

State = dict[str, Any]


def flat() -> State:
    return {"a": torch.ones(3), "b": torch.zeros(2, 2), "c": torch.nn.Parameter(torch.ones(4))}


def nested() -> State:
    return {"model": flat(), "optimizer": {"a.exp_avg": torch.ones(3)}}


kinds = pytest.mark.parametrize("make", [flat, nested])


@kinds
@pytest.mark.skipif(looks._exchange is None, reason="this torch has no quick way to look")
def test_the_same_tensors_are_not_worked_out_again(make: Callable[[], State]) -> None:
    jobs, state = Jobs(), make()
    first, second = jobs.job(state), jobs.job(dict(state))
    assert second.specs is first.specs
    assert list(map(id, second.tensors)) == list(map(id, first.tensors))
    assert (second.late, second.plain) == (first.late, first.plain)


def _rename(state: State) -> None:
    state["z"] = state.pop("a")


def _reorder(state: State) -> None:
    state["a"] = state.pop("a")


def _replace(state: State) -> None:
    state["a"] = torch.ones(5)


def _reshape(state: State) -> None:
    state["a"].resize_(1, 3)


def _retype(state: State) -> None:
    state["a"].data = torch.ones(3, dtype=torch.float64)


def _add(state: State) -> None:
    state["d"] = torch.ones(1)


def _add_plain(state: State) -> None:
    state["d"] = 7


def _make_complex(state: State) -> None:
    state["a"] = torch.ones(3, dtype=torch.complex64)


@pytest.mark.parametrize("change", [_rename, _reorder, _replace, _reshape, _retype, _add, _add_plain, _make_complex])
@kinds
def test_a_state_that_changed_is_looked_at_anew(make: Callable[[], State], change: Callable[[State], None]) -> None:
    jobs, state = Jobs(), make()
    jobs.job(state)
    change(state.get("model", state))
    found, anew = jobs.job(state), Jobs().job(state)
    assert found.specs == anew.specs
    assert found.plain == anew.plain
    assert list(map(id, found.tensors)) == list(map(id, anew.tensors))


def test_the_same_tensors_under_the_names_of_other_dicts_are_looked_at_anew() -> None:
    jobs, one, other = Jobs(), torch.ones(3), torch.ones(3)
    jobs.job({"model": {"a": one, "b": other}, "rest": {}})
    found = jobs.job({"model": {"a": one}, "rest": {"b": other}})
    assert [spec.key for spec in found.specs] == ["model.a", "rest.b"]


def test_numbers_for_names_are_refused_also_where_strings_were_known() -> None:
    jobs, tensor = Jobs(), torch.ones(3)
    jobs.job({"a": tensor})
    with pytest.raises(UsageError, match="strings for names"):
        jobs.job({1: tensor})  # type: ignore[dict-item]


def test_an_empty_state_is_a_job_of_nothing() -> None:
    assert Jobs().job({}).specs == []


def test_what_is_remembered_keeps_no_tensor() -> None:
    jobs, state = Jobs(), flat()
    jobs.job(state)
    seen = [weakref.ref(tensor) for tensor in state.values()]
    del state
    assert [one() for one in seen] == [None] * 3
