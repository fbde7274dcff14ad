"""Makes bad inputs of good ones: of their bytes, and of what they say where they are JSON."""

from __future__ import annotations

import json
import random
from typing import Any

_NUMBERS = (-1, 0, 1, 255, 4095, 4096, 1 << 31, 1 << 53, 1 << 63, 1 << 64, 10**30, 1.5, -0.0, 1e308)
_STRINGS = ("", "..", "../../etc/passwd", "/", "\0", "a" * 5000, "$", "é", "0" * 64, "packs/00000", "nan", "0x")
_TOKENS = (b"[", b"]", b"{", b"}", b'"', b"\\", b",", b":", b"null", b"\xff", b"\x00", b"1e999", b"\\ud800", b"[" * 900)


def mutated(data: bytes, dice: random.Random) -> bytes:
    """One bad input, usually."""
    if dice.random() < 0.5:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return _bytes(data, dice)
        for _ in range(dice.randint(1, 3)):
            value = _value(value, dice)
        return json.dumps(value, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return _bytes(data, dice)


def _bytes(data: bytes, dice: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(found) + 1)
        match dice.randrange(5):
            case 0 if place < len(found):
                found[place] ^= 1 << dice.randrange(8)
            case 1:
                del found[place : place + dice.randint(1, 20)]
            case 2:
                found[place:place] = dice.choice(_TOKENS)
            case 3:
                end = place + dice.randint(1, 40)
                found[place:place] = found[place:end]
            case _:
                found[place : place + 4] = dice.randbytes(4)
    return bytes(found)


def _value(value: Any, dice: random.Random) -> Any:
    """The value with one thing in it changed."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(list(value))
        found = dict(value)
        match dice.randrange(6):
            case 0:
                del found[key]
            case 1:
                found[dice.choice(_STRINGS)] = found[key]
            case _:
                found[key] = _value(found[key], dice)
        return found
    if isinstance(value, list) and value and dice.random() < 0.85:
        place = dice.randrange(len(value))
        match dice.randrange(6):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return value[:place] + [value[place]] * dice.randint(2, 5) + value[place:]
            case _:
                return [*value[:place], _value(value[place], dice), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and dice.random() < 0.4:
        return value + dice.choice((-4096, -1, 1, 4096))
    return _other(dice)


def _other(dice: random.Random) -> Any:
    match dice.randrange(7):
        case 0:
            return dice.choice(_NUMBERS)
        case 1:
            return dice.choice(_STRINGS)
        case 2:
            return None
        case 3:
            return {}
        case 4:
            return {"$": [dice.choice(("int", "float", "bytes", "tuple", "dict", "")), dice.choice(_STRINGS)]}
        case 5:
            return {"$": [dice.choice(("tuple", "dict")), [[[], 1], [{"$": ["tuple", [[]]]}, 2]]]}
        case _:
            return [[[[1]]]]
