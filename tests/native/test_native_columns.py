"""Members of many records at once: what is read, what is equal, and what is refused."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import msgspec
import pytest

from ftrain._native import column, column_is, column_words, columns_equal


class Record(msgspec.Struct):
    name: str
    size: int
    shape: tuple[int, ...] = ()


@dataclass(slots=True)
class Other:
    title: str
    form: tuple[int, ...]


class Loose:
    name = "any"


RECORDS = [Record(f"r{number}", number, (number, 3)) for number in range(50)]


def others() -> list[Other]:
    return [Other("".join(("r", str(number))), (number, 3)) for number in range(50)]


def test_a_column_is_the_member_of_each_record_in_order() -> None:
    assert column(RECORDS, Record.name) == [record.name for record in RECORDS]
    assert column(tuple(RECORDS), Record.shape)[7] is RECORDS[7].shape
    assert array("Q", column_words(RECORDS, Record.size)) == array("Q", range(50))
    assert column([], Record.name) == []
    assert column_words((), Record.size) == b""


def test_columns_of_other_classes_are_equal_by_value() -> None:
    assert columns_equal(RECORDS, (Record.name, Record.shape), tuple(others()), (Other.title, Other.form))
    assert columns_equal([], (), [], ())


@pytest.mark.parametrize("place", [0, 20, 49])
def test_one_other_value_is_noticed_wherever_it_is(place: int) -> None:
    changed = others()
    changed[place].form = (place, 4)
    assert columns_equal(RECORDS, (Record.name,), changed, (Other.title,))
    assert not columns_equal(RECORDS, (Record.name, Record.shape), changed, (Other.title, Other.form))


def test_one_record_more_is_not_equal() -> None:
    assert not columns_equal(RECORDS, (Record.name,), others()[:-1], (Other.title,))


def test_a_column_of_one_object_is_found_to_be_that() -> None:
    records = [Record("a", 1, None) for _ in range(30)]  # type: ignore[arg-type]
    assert column_is(records, Record.shape, None)
    records[29].shape = ()
    assert not column_is(records, Record.shape, None)


def test_a_subclass_has_the_members_too() -> None:
    class Special(Record):
        pass

    assert column([Special("s", 1)], Record.name) == ["s"]


def test_what_is_no_member_or_no_such_record_is_refused() -> None:
    with pytest.raises(TypeError, match="another type"):
        column([RECORDS[0], others()[0]], Record.name)
    with pytest.raises(TypeError, match="descriptor"):
        column(RECORDS, Loose.name)
    with pytest.raises(TypeError, match="list or a tuple"):
        column(iter(RECORDS), Record.name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pairs"):
        columns_equal(RECORDS, (Record.name,), RECORDS, ())
    with pytest.raises(OverflowError):
        column_words([Record("a", -1)], Record.size)
    with pytest.raises(TypeError, match="no such member"):
        column([Other.__new__(Other)], Other.title)


def test_an_error_of_a_comparison_comes_out() -> None:
    class Angry:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("no comparison")

        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(RuntimeError, match="no comparison"):
        columns_equal([Record(Angry(), 1)], (Record.name,), [Record("a", 1)], (Record.name,))  # type: ignore[arg-type]
