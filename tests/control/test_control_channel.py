"""Decoding: whatever the bytes, a message or a ProtocolError of one line."""

from __future__ import annotations

import json

import msgspec
import pytest
from control_parties import Log, hello
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.control.channel import NESTING_MAX, decode_from_agent, decode_from_coordinator, encode
from ftrain.control.refusals import LINE_CHARS_MAX, Refusals, printable
from ftrain.core import messages as m
from ftrain.errors import ProtocolError

ATTEMPT = m.Attempt(1, 2, 3)
FROM_AGENT = [
    hello(report=m.Report(ranks=(m.RunningRank(0, 0, 1, 5, 3),), exits=(m.RankExit(1, 1, 2, 1),))),
    m.Heartbeat(
        sequence=1, report=m.Report(exits=(m.RankExit(0, 0, 1, 1, error=m.ErrorReport("E", '{[\\"', "]}\n")),))
    ),
    m.StoreReady(generation=1, address="::1", port=1),
    m.Changed(report=m.Report()),
    m.ArmReply(attempt=ATTEMPT, accepted=False, reason="no"),
    m.Sealed(attempt=ATTEMPT, ranks=(1,)),
    m.Prepared(attempt=ATTEMPT, pack=m.PackRecord(0, "p", "i", "0" * 64, 1, 2, 3)),
    m.AttemptFailed(attempt=ATTEMPT, rank=0, cause="full"),
    m.Notice(why="SIGTERM", grace_seconds=30),
    m.Metrics(generation=1, step=2, values={"loss": 0.5}),
    m.Goodbye(why=""),
]
FROM_COORDINATOR = [
    m.Welcome("r", 1, 5.0, 1.0),
    m.Declined("another job", 2),
    m.Prepare(1, 2),
    m.Start(1, 2, 0, 1, 0, 2, "a", "127.0.0.1", 1, 0, 3, m.Resume(ATTEMPT, 2, 7, "0" * 64)),
    m.Stop(1, 2, "why", 1.0),
    m.Halt(1, 2, "why"),
    m.KillRank(1, 2, 3, 4, 5, m.Hang("it is stopped", 1.5, (0,), "train.py")),
    m.Arm(1, ATTEMPT),
    m.Copy(1, ATTEMPT),
    m.Abort(1, ATTEMPT, "cause"),
    m.Committed(1, ATTEMPT),
    m.Verdict(1, ATTEMPT, True),
    m.Release(1, 2),
    m.Leave(1, 0, "done"),
    m.Tell("line"),
    m.Heard(7, 9),
]

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
objects = st.dictionaries(st.text(max_size=8), plain, max_size=3)


def _message_or_refusal(data: bytes) -> None:
    for decode in (decode_from_agent, decode_from_coordinator):
        line = ""
        try:
            assert isinstance(decode(data, "somebody"), msgspec.Struct)
        except ProtocolError as error:
            line = str(error)
        assert line == "" or line.startswith("somebody sent ")
        assert line.isprintable()
        assert len(line) <= LINE_CHARS_MAX


@pytest.mark.parametrize("message", FROM_AGENT, ids=lambda message: type(message).__name__)
def test_agent_messages_round_trip(message: m.FromAgent) -> None:
    assert decode_from_agent(encode(message), "x") == message
    with pytest.raises(ProtocolError):
        decode_from_coordinator(encode(message), "x")


@pytest.mark.parametrize("message", FROM_COORDINATOR, ids=lambda message: type(message).__name__)
def test_coordinator_messages_round_trip(message: m.FromCoordinator) -> None:
    assert decode_from_coordinator(encode(message), "x") == message
    with pytest.raises(ProtocolError):
        decode_from_agent(encode(message), "x")


def test_samples_cover_every_message() -> None:
    assert {type(message) for message in FROM_AGENT} == set(m.FromAgent.__args__)
    assert {type(message) for message in FROM_COORDINATOR} == set(m.FromCoordinator.__args__)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_in_one_line(data: bytes) -> None:
    _message_or_refusal(data)


@given(st.text(alphabet='[]{}",:\\0e-.ntu ', max_size=300))
def test_random_punctuation_is_refused_in_one_line(text: str) -> None:
    _message_or_refusal(text.encode())


@given(st.sampled_from(FROM_AGENT + FROM_COORDINATOR), st.data())
@settings(max_examples=300)
def test_damaged_messages_are_refused_in_one_line(message: m.FromAgent, data: st.DataObject) -> None:
    raw = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    _message_or_refusal(bytes(raw))


@given(
    st.sampled_from(FROM_AGENT + FROM_COORDINATOR), st.dictionaries(st.text(max_size=8), plain, max_size=3), st.data()
)
@settings(max_examples=300)
def test_fields_of_other_types_are_refused_in_one_line(
    message: m.FromAgent, extra: dict[str, object], data: st.DataObject
) -> None:
    fields = json.loads(encode(message)) | extra
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(plain)
    _message_or_refusal(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"[" * (4 << 20),
        b"{" * (4 << 20),
        b'{"a":' * 800_000,
        b"[[]" * (1 << 20),
        b"[" * 1000 + b"]" * 1000,
        b'{"x":' + b"[" * 1000 + b"]" * 1000 + b',"kind":"goodbye","why":""}',
        b'"' + b'\\"' * (2 << 20),
        b'"\\' * (2 << 20),
        b'["' * (2 << 20),
        b"[]" * (2 << 20),
    ],
)
def test_adversarial_nesting_is_refused(data: bytes) -> None:
    _message_or_refusal(data)


def test_nesting_up_to_the_cap_reaches_the_decoder() -> None:
    flat = b"[" * NESTING_MAX + b"]" * NESTING_MAX + b"[]" * 100
    with pytest.raises(ProtocolError, match="sent what is not a message"):
        decode_from_agent(flat, "x")
    with pytest.raises(ProtocolError, match=f"over {NESTING_MAX} levels"):
        decode_from_agent(b"[" + flat + b"]", "x")


def test_brackets_in_strings_do_not_count() -> None:
    message = m.AttemptFailed(attempt=ATTEMPT, rank=0, cause='[{"\\' * 1000 + "\\")
    assert decode_from_agent(encode(message), "x") == message


def test_printable_is_one_bounded_line() -> None:
    assert printable("a\nb\x1b[31m\u2028c") == "a b [31m c"
    assert len(printable("x" * 10_000)) == LINE_CHARS_MAX


async def test_refusals_in_one_second_are_counted_in_one_line(log: Log) -> None:
    refusals = Refusals()
    for i in range(1000):
        refusals.add(f"number {i}")
    assert log.lines == ["number 0"]
    await log.wait_for(lambda lines: len(lines) == 2)
    assert log.lines[1] == "number 999 (and 998 more like it within a second)"
    refusals.add("number 1000")
    refusals.close()
    assert log.lines[2] == "number 1000"
