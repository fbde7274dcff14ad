from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftrain.core.plain import DEPTH_MAX, decode, encode
from ftrain.errors import CorruptCheckpoint, NotPlainData

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9) | st.binary(max_size=9)
)
hashable = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)
plain = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=25,
)


def typed(value: object) -> object:
    """The value with all its types and the order of its dicts: 1, 1.0 and True are three things here."""
    if isinstance(value, list | tuple):
        return type(value), [typed(item) for item in value]
    if isinstance(value, dict):
        return dict, [(typed(key), typed(item)) for key, item in value.items()]
    return type(value), repr(value)


@given(plain)
def test_any_plain_value_comes_back_the_same_through_json(value: object) -> None:
    text = json.dumps(encode(value, "value"), allow_nan=False)
    assert typed(decode(json.loads(text))) == typed(value)


def test_nan_and_the_tag_itself_come_back() -> None:
    back = decode(json.loads(json.dumps(encode({"$": [math.nan, math.inf, -math.inf, 2**53, -(2**53) - 1]}, "v"))))
    assert isinstance(back, dict)
    assert math.isnan(back["$"][0])
    assert back["$"][1:] == [math.inf, -math.inf, 2**53, -(2**53) - 1]


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, {"b": {1, 2}}]}, "state.a[1].b"),
        ((1, 2 + 3j), "state[1]"),
        ({3: print}, "state[3]"),
        ({frozenset(): 1}, "state, key frozenset()"),
        ([Text("x")], "state[0]"),
        (["\ud800"], "state[0]"),
    ],
)
def test_what_is_not_plain_is_refused_with_its_place(value: object, where: str) -> None:
    with pytest.raises(NotPlainData) as caught:
        encode(value, "state")
    assert str(caught.value).startswith(f"{where}: ")


def test_too_deep_a_value_is_refused() -> None:
    value: list[object] = []
    for _ in range(DEPTH_MAX - 1):
        value = [value]
    assert decode(encode(value, "deep")) == value
    with pytest.raises(NotPlainData, match="deeper"):
        encode([value], "deep")
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(NotPlainData, match="deeper"):
        encode(endless, "deep")


@pytest.mark.parametrize(
    "form",
    [
        {"$": ["int", "zz"]},
        {"$": ["bytes", "@@"]},
        {"$": ["float", "x"]},
        {"$": ["dict", [[1]]]},
        {"$": ["dict", [[[1], 2]]]},
        {"$": ["set", []]},
        {"$": 5},
        {"$": ["tuple", []], "more": 1},
        object(),
    ],
)
def test_a_form_that_is_never_written_is_refused(form: object) -> None:
    with pytest.raises(CorruptCheckpoint):
        decode(form)


def test_a_form_that_is_nested_too_deep_is_refused() -> None:
    form: list[object] = []
    for _ in range(DEPTH_MAX + 2):
        form = [form]
    with pytest.raises(CorruptCheckpoint, match="deeper"):
        decode(form)
