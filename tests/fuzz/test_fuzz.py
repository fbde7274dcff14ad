"""Whatever the bytes, a parser returns or raises one of ftrain's errors. `python -m tests.fuzz` goes on for longer."""

from __future__ import annotations

import random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.agent import peer_wire
from ftrain.core import messages as m
from ftrain.core import plain
from ftrain.errors import CorruptCheckpoint, ProtocolError
from tests.fuzz.messages import FROM_AGENT, FROM_COORDINATOR, FROM_PEER
from tests.fuzz.mutate import Sample, mutated
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
    good = [Sample.of(data) for data in samples(target)]
    for _ in range(500):
        execute(target, mutated(dice.choice(good), dice))


@pytest.mark.parametrize(
    ("kinds", "good"),
    [(m.FromAgent, FROM_AGENT), (m.FromCoordinator, FROM_COORDINATOR), (peer_wire.Message, FROM_PEER)],
)
def test_each_kind_of_message_is_among_the_samples(kinds: object, good: list[object]) -> None:
    assert set(get_args(kinds)) == {type(message) for message in good}


LONG = "\\u0007" * 10_000


@pytest.mark.parametrize("data", [f'{{"kind":"{LONG}"}}', f'{{"kind":"done","{LONG}":1}}'])
def test_what_a_peer_sends_for_a_message_is_not_repeated_at_length(data: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        TARGETS["peer-message"](data.encode())
    assert len(str(refused.value)) <= 300
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("kind", ["int", "float", "bytes"])
def test_a_malformed_value_is_not_repeated_at_length(kind: str) -> None:
    with pytest.raises(CorruptCheckpoint) as refused:
        plain.decode({"$": [kind, "\xe9" * 100_000]})
    assert len(str(refused.value)) < 300
