"""Ranges of objects as requests: near ones together, large ones cut, so that each is worth its round trip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ftrain.storage.base import Ranges

SPAN_BYTES = 8 << 20  # of one request
GAP_BYTES_MAX = 1 << 20  # read and dropped, rather than asking twice


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of one range, or all of it."""

    place: int  # of the range
    offset: int  # in the object
    nbytes: int
    address: int  # 0: only to be proved


@dataclass(frozen=True, slots=True)
class Span:
    """What one request brings, and what of it goes where."""

    path: str
    begin: int
    end: int
    pieces: tuple[Piece, ...]


def errands(ranges: Ranges) -> Iterator[list[Span]]:
    """All of the ranges but the empty ones: spans that are to be read one after the other, and each list by itself.

    The pieces of a range that is only proved come in order in one errand, so that its checksum can go on from one to
    the next; those that go to memory may be read in any order.
    """
    held: list[Span] = []
    for span in _spans(ranges):
        first = span.pieces[0]
        goes_on = held and not first.address and first.offset > ranges.offsets[first.place]
        if held and not goes_on:
            yield held
            held = []
        held.append(span)
    if held:
        yield held


def _spans(ranges: Ranges) -> Iterator[Span]:
    order = sorted(range(len(ranges)), key=lambda place: (ranges.files[place], ranges.offsets[place]))
    held: list[Piece] = []
    path, end = "", 0
    for place in order:
        for piece in _cut(ranges, place):
            near = ranges.paths[ranges.files[place]] == path and piece.offset <= end + GAP_BYTES_MAX
            if held and not (near and held[0].offset <= piece.offset <= held[0].offset + SPAN_BYTES - piece.nbytes):
                yield _span(path, held)
                held = []
            if not held:
                path, end = ranges.paths[ranges.files[place]], 0
            held.append(piece)
            end = max(end, piece.offset + piece.nbytes)
    if held:
        yield _span(path, held)


def _cut(ranges: Ranges, place: int) -> Iterator[Piece]:
    offset, rest, address = ranges.offsets[place], ranges.sizes[place], ranges.addresses[place]
    while rest:
        nbytes = min(rest, SPAN_BYTES)
        yield Piece(place, offset, nbytes, address)
        offset, rest, address = offset + nbytes, rest - nbytes, address and address + nbytes


def _span(path: str, pieces: list[Piece]) -> Span:
    end = max(piece.offset + piece.nbytes for piece in pieces)
    return Span(path, pieces[0].offset, end, tuple(pieces))
