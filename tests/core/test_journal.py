"""The journal's fence: docs/protocol.md, "One history"."""

from __future__ import annotations

import msgspec
import pytest

from ftrain.core import journal
from ftrain.core.journal import Created, Head, History, Outcome, ReadBack, Record, Stage
from ftrain.core.messages import Attempt
from ftrain.errors import CorruptCheckpoint

RUN = journal.RunBody("run", "job", "1")
ATTEMPT = Attempt(1, 10, 1)
COMMIT = journal.CommitBody(ATTEMPT, 2, "f" * 64, 100)


def appender(writer: str = "c1") -> journal.Appender:
    return journal.Appender(writer, Head())


def play(
    state: journal.Appender, *events: journal.Event, now: float = 0.0
) -> tuple[journal.Appender, list[journal.Action]]:
    asked: list[journal.Action] = []
    for event in events:
        state, actions = journal.step(state, event, now, 1000.0)
        asked += actions
    return state, asked


def creating() -> tuple[journal.Appender, journal.Create]:
    state, (create,) = play(appender(), journal.Append(RUN))
    assert isinstance(create, journal.Create)
    return state, create


def test_record_that_storage_took_is_appended() -> None:
    state, create = creating()
    assert create.path == "journal/00000000000000000001.json"
    state, (done,) = play(state, Created(create.path, Outcome.CREATED))
    assert isinstance(done, journal.Appended)
    assert done.record == journal.decode(create.data, create.path)
    assert state.head == Head(1, journal.digest(create.data))


def test_record_that_is_appended_comes_with_the_digest_of_its_file() -> None:
    state, (create,) = play(appender(), journal.Append(RUN))
    assert isinstance(create, journal.Create)
    state, (appended,) = play(state, journal.Created(create.path, Outcome.CREATED))
    assert isinstance(appended, journal.Appended)
    assert appended.digest == journal.digest(create.data) == state.head.digest


def test_records_are_written_one_at_a_time_each_naming_its_predecessor() -> None:
    state, create = creating()
    state, asked = play(state, journal.Append(COMMIT))
    assert asked == []
    state, (_, second) = play(state, Created(create.path, Outcome.CREATED))
    assert isinstance(second, journal.Create)
    assert journal.decode(second.data, second.path).previous == journal.digest(create.data)


def test_taken_name_with_another_record_fences_for_good() -> None:
    state, create = creating()
    state, (read,) = play(state, Created(create.path, Outcome.EXISTS))
    assert read == journal.Read(create.path)
    other = journal.encode(Record(1, "", "c2:1", 0.0, RUN))
    state, (lost,) = play(state, ReadBack(create.path, other))
    assert lost == journal.Lost(create.path)
    assert play(state, journal.Append(COMMIT), journal.Retry(), now=99.0) == (state, [])


@pytest.mark.parametrize("outcome", [Outcome.UNKNOWN, Outcome.EXISTS])
def test_lost_reply_is_read_back_and_our_own_record_counts(outcome: Outcome) -> None:
    state, create = creating()
    state, _ = play(state, Created(create.path, outcome))
    state, (done,) = play(state, ReadBack(create.path, create.data))
    assert isinstance(done, journal.Appended)


def test_lost_reply_with_nothing_there_is_written_again_as_it_was() -> None:
    state, create = creating()
    state, asked = play(state, Created(create.path, Outcome.UNKNOWN), ReadBack(create.path, None))
    assert asked == [journal.Read(create.path), create]


def test_refused_write_is_tried_again_after_a_look() -> None:
    state, create = creating()
    state, (stalled,) = play(state, Created(create.path, Outcome.FAILED, "disk full"), now=5.0)
    assert stalled == journal.Stalled(create.path, "disk full", 5.2)
    assert play(state, journal.Retry(), now=5.1) == (state, [])
    assert play(state, journal.Retry(), now=5.2)[1] == [journal.Read(create.path)]


def test_answer_about_another_record_is_passed_over() -> None:
    state, _ = creating()
    assert play(state, Created("journal/00000000000000000009.json", Outcome.CREATED)) == (state, [])


def test_probe_finds_who_continued_the_history() -> None:
    state, (read,) = play(appender(), journal.Probe())
    assert read == journal.Read("journal/00000000000000000001.json")
    idle, _ = play(state, ReadBack(read.path, None))
    assert idle == appender()
    fenced, (lost,) = play(state, ReadBack(read.path, b"anything"))
    assert isinstance(lost, journal.Lost)
    assert fenced.stage is Stage.FENCED


def test_append_during_a_probe_is_written_after_it() -> None:
    state, (read,) = play(appender(), journal.Probe())
    state, asked = play(state, journal.Append(RUN))
    assert asked == []
    assert isinstance(read, journal.Read)
    _, (create,) = play(state, ReadBack(read.path, None))
    assert isinstance(create, journal.Create)


def test_history_follows_the_chain() -> None:
    history = History()
    bodies: tuple[journal.Body, ...] = (
        RUN,
        journal.GenerationBody(1, 2, (), None),
        COMMIT,
        journal.RetireBody(ATTEMPT),
        journal.FinishBody(0, 10, "done"),
    )
    for sequence, body in enumerate(bodies, 1):
        record = Record(sequence, history.head.digest, f"c1:{sequence}", 0.0, body)
        history = history.after(record, journal.digest(journal.encode(record)))
    assert (history.commits, history.retired, history.finish) == ((), (journal.Committed(3, 0.0, COMMIT),), bodies[-1])
    with pytest.raises(CorruptCheckpoint, match="does not continue"):
        history.after(record, "")


def test_new_run_record_takes_the_finish_back() -> None:
    history = History(finish=journal.FinishBody(0, 10, "done"))
    assert history.after(Record(1, "", "c1:1", 0.0, RUN), "x").finish is None


def test_changed_byte_is_found_wherever_it_is() -> None:
    data = journal.encode(Record(1, "", "c1:1", 0.0, COMMIT))
    for place in range(len(data)):
        damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(CorruptCheckpoint, match="journal/1"):
            journal.decode(damaged, "journal/1")


@pytest.mark.parametrize("data", [b"", b"null", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"sha256":"","record":{}}'])
def test_nonsense_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(CorruptCheckpoint, match="journal/1"):
        journal.decode(data, "journal/1")


def test_oversized_record_is_refused_before_it_is_read() -> None:
    with pytest.raises(CorruptCheckpoint, match="over the limit"):
        journal.decode(b" " * (journal.RECORD_BYTES_MAX + 1), "journal/1")


def test_record_survives_encoding() -> None:
    record = Record(7, "ab", "c1:7", 12.5, COMMIT)
    assert journal.decode(journal.encode(record), "x") == record
    assert msgspec.json.decode(journal.encode(record))["record"]["body"]["kind"] == "commit"
