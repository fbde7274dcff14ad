"""Makes bad inputs of good ones: of their bytes, and of what they say where they are JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
_NUMBERS = (-1, 0, 1, 255, 4095, 4096, 1 << 31, 1 << 53, 1 << 63, 1 << 64, 10**30, 1.5, -0.0, 1e308)
_STRINGS = ("", "..", "../../etc/passwd", "/", "\0", "a" * 5000, "$", "é", "0" * 64, "packs/00000", "nan", "0x")
_TOKENS = (b"[", b"]", b"{", b"}", b'"', b"\\", b",", b":", b"null", b"\xff", b"\x00", b"1e999", b"\\ud800", b"[" * 900)


@dataclass(frozen=True, slots=True)
class Sample:
    """An input that bad ones are made of, and what it says, where it is JSON."""

    data: bytes
    value: Any
    is_json: bool

    @staticmethod
    def of(data: bytes) -> Sample:
        try:
            return Sample(data, json.loads(data), True)
        except (ValueError, RecursionError):
            return Sample(data, None, False)


def mutated(sample: Sample, dice: random.Random) -> bytes:
    """One bad input, usually."""
    if not sample.is_json or dice.random() < 0.5:
        return _bytes(sample.data, dice)
    value = sample.value
    for _ in range(1 + below(3, dice)):
        value = _value(value, dice)
    return _encoded(value, dice)


def below(end: int, dice: random.Random) -> int:
    """As `dice.randrange(end)`, in a fifth of its time."""
    return int(dice.random() * end)


def _one_of(values: Sequence[T], dice: random.Random) -> T:
    return values[below(len(values), dice)]


def _encoded(value: Any, dice: random.Random) -> bytes:
    """By the quick encoder as a rule; the other escapes what is not ASCII, and writes any number and any string."""
    if below(8, dice):
        try:
            return msgspec.json.encode(value)
        except (ValueError, OverflowError, RecursionError):
            pass
    return json.dumps(value, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _bytes(data: bytes, dice: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(1 + below(4, dice)):
        place = below(len(found) + 1, dice)
        match below(5, dice):
            case 0 if place < len(found):
                found[place] ^= 1 << below(8, dice)
            case 1:
                del found[place : place + 1 + below(20, dice)]
            case 2:
                found[place:place] = _one_of(_TOKENS, dice)
            case 3:
                end = place + 1 + below(40, dice)
                found[place:place] = found[place:end]
            case _:
                found[place : place + 4] = dice.randbytes(4)
    return bytes(found)


def _value(value: Any, dice: random.Random) -> Any:
    """The value with one thing in it changed. What is in it is left as it is."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = _one_of(list(value), dice)
        found = dict(value)
        match below(6, dice):
            case 0:
                del found[key]
            case 1:
                found[_one_of(_STRINGS, dice)] = found[key]
            case _:
                found[key] = _value(found[key], dice)
        return found
    if isinstance(value, list) and value and dice.random() < 0.85:
        place = below(len(value), dice)
        match below(6, dice):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return value[:place] + [value[place]] * (2 + below(4, dice)) + value[place:]
            case _:
                return [*value[:place], _value(value[place], dice), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and dice.random() < 0.4:
        return value + _one_of((-4096, -1, 1, 4096), dice)
    return _other(dice)


def _other(dice: random.Random) -> Any:
    match below(7, dice):
        case 0:
            return _one_of(_NUMBERS, dice)
        case 1:
            return _one_of(_STRINGS, dice)
        case 2:
            return None
        case 3:
            return {}
        case 4:
            return {"$": [_one_of(("int", "float", "bytes", "tuple", "dict", ""), dice), _one_of(_STRINGS, dice)]}
        case 5:
            return {"$": [_one_of(("tuple", "dict"), dice), [[[], 1], [{"$": ["tuple", [[]]]}, 2]]]}
        case _:
            return [[[[1]]]]
