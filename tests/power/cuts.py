"""What a disk may hold after the power was cut at a flush point of a log.

All that was written before the last flush that was answered is there. Of what was written since, a disk with a volatile
cache holds whatever it got to: nothing, all, or some of it, in any order, a write torn between two sectors.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.crash.judge import Expected
from tests.crash.life import Told
from tests.power.files import copy_sparse
from tests.power.recorder import Entry, Kind
from tests.power.run import Recording
from tests.power.told import read_marks

KEPT_SHARE = 0.5  # of the writes since the last flush, where some are kept
TORN_SHARE = 0.5  # of these
HOWS = ("nothing", "some", "all")  # is kept of what was written since the last flush


@dataclass(frozen=True, slots=True)
class Cut:
    """The power goes at entry `end` of the log; entries before `begin` are durable."""

    begin: int
    end: int
    how: str

    def __str__(self) -> str:
        return f"cut at entry {self.end}, {self.how} kept of what came after entry {self.begin}"


def flush_points(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """(first entry after the flush before, the entry that is this flush), for each, the end of the log being one."""
    found, begin = [], 0
    for place, entry in enumerate(entries):
        if entry.kind is Kind.FLUSH:
            found.append((begin, place))
            begin = place + 1
    return [*found, (begin, len(entries))]


def cuts_at(point: tuple[int, int], dice: random.Random) -> Iterator[Cut]:
    """Just before the flush is answered; and with some of it kept, at any moment since the one before."""
    begin, end = point
    for how in HOWS:
        yield Cut(begin, dice.randint(begin, end) if how == "some" else end, how)


def expected_at(recording: Recording, end: int) -> Expected:
    """What had been said of commits before entry `end` of the log."""
    marks = read_marks([entry.data for entry in recording.entries[:end] if entry.kind is Kind.MARK])
    return recording.before.after(Told(mark.what, mark.attempt) for mark in marks)


class Disk:
    """The disk's durable content, moved along the log, in the file `image`, which is changed."""

    def __init__(self, image: Path, entries: Sequence[Entry], sector_bytes: int) -> None:
        self._image = image
        self._entries = entries
        self._sector_bytes = sector_bytes
        self._at = 0  # entries before it are in the image

    def after(self, cut: Cut, target: Path, dice: random.Random) -> None:
        """Write what is left by this cut to the file `target`. Cuts must be asked for in the order of the log."""
        assert cut.begin >= self._at, "the disk does not go back"
        _apply(self._image, self._entries[self._at : cut.begin])
        self._at = cut.begin
        copy_sparse(self._image, target)
        since = [entry for entry in self._entries[cut.begin : cut.end] if entry.kind is Kind.WRITE]
        match cut.how:
            case "all":
                _apply(target, since)
            case "some":
                _apply(target, list(_some(since, self._sector_bytes, dice)))


def _some(writes: Sequence[Entry], sector_bytes: int, dice: random.Random) -> Iterator[Entry]:
    for entry in writes:
        if dice.random() >= KEPT_SHARE:
            continue
        if dice.random() >= TORN_SHARE:
            yield entry
            continue
        at, end = entry.offset, entry.offset + len(entry.data)
        while at < end:
            next_sector = min(at - at % sector_bytes + sector_bytes, end)
            if dice.random() < KEPT_SHARE:
                yield Entry(Kind.WRITE, at, entry.data[at - entry.offset : next_sector - entry.offset])
            at = next_sector


def _apply(image: Path, entries: Sequence[Entry]) -> None:
    descriptor = os.open(image, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for entry in entries:
            if entry.kind is Kind.WRITE:
                os.pwrite(descriptor, entry.data, entry.offset)
    finally:
        os.close(descriptor)
