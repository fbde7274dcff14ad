"""Whatever the bytes, a parser returns or raises one of ftrain's errors. `python -m tests.fuzz` goes on for longer."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS, execute, samples


@pytest.mark.parametrize("target", TARGETS)
def test_a_good_input_is_taken(target: str) -> None:
    assert all(execute(target, data) for data in samples(target))


@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes_are_refused_with_an_error_of_ftrain(target: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(st.binary(max_size=200))
    def check(data: bytes) -> None:
        execute(target, data)

    check()


@pytest.mark.parametrize("target", TARGETS)
def test_bad_inputs_made_of_good_ones_are_refused_with_an_error_of_ftrain(target: str) -> None:
    dice = random.Random(target)
    good = samples(target)
    for _ in range(500):
        execute(target, mutated(dice.choice(good), dice))
