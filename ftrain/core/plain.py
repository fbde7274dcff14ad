"""Plain data as JSON and back, exactly: what a checkpoint may hold beside tensors, without pickle.

Strings, booleans, None and most lists and dicts stand for themselves. Everything that JSON would bend (tuples,
bytes, big integers, nan and inf, dicts whose keys are not strings) becomes an object with the single key `$`, as
docs/format.md lists.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping

import msgspec

from ftrain.errors import CorruptCheckpoint, NotPlainData

DEPTH_MAX = 64
TAG = "$"
_JSON_INTEGER_MAX = 1 << 53  # beyond it a JSON reader may round


class Encoded:
    """Plain data that was encoded before: `encode` leaves it as it is. For what is large and stays the same."""

    __slots__ = ("raw",)

    def __init__(self, value: object, where: str) -> None:
        """Raises as `encode`."""
        self.raw = msgspec.Raw(msgspec.json.encode(encode(value, where)))


def encode(value: object, where: str) -> object:
    """The JSON-able form of `value`; `where` names it in errors.

    Raises `NotPlainData` with the key path of the first value that is not None, bool, int, float, str, bytes, list,
    tuple or dict, or that is nested deeper than DEPTH_MAX. Subclasses are refused: they would come back as
    something else.
    """
    return _encode(value, where, DEPTH_MAX)


def decode(value: object) -> object:
    """The value that `encode` was given, types included. Raises `CorruptCheckpoint` for a form that it never makes."""
    return _decode(value, DEPTH_MAX + 1)


def _encode(value: object, where: str, depth: int) -> object:
    if depth == 0:
        raise NotPlainData(f"{where}: nested deeper than {DEPTH_MAX} levels, which a checkpoint cannot hold")
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is Encoded:
        assert isinstance(value, Encoded)
        return value.raw
    if kind is str:
        assert isinstance(value, str)
        return _encode_string(value, where)
    if kind is int:
        assert isinstance(value, int)
        return value if abs(value) <= _JSON_INTEGER_MAX else {TAG: ["int", hex(value)]}
    if kind is float:
        assert isinstance(value, float)
        return value if math.isfinite(value) else {TAG: ["float", repr(value)]}
    if kind is bytes:
        assert isinstance(value, bytes)
        return {TAG: ["bytes", base64.b64encode(value).decode("ascii")]}
    if kind is list or kind is tuple:
        assert isinstance(value, list | tuple)
        items = [_encode(item, f"{where}[{place}]", depth - 1) for place, item in enumerate(value)]
        return items if kind is list else {TAG: ["tuple", items]}
    if kind is dict:
        assert isinstance(value, dict)
        return _encode_dict(value, where, depth)
    raise NotPlainData(
        f"{where}: a value of type {kind.__module__}.{kind.__qualname__} is neither a tensor nor plain data "
        "(None, bool, int, float, str, bytes, list, tuple, dict); convert it, or leave it out of the tracked state"
    )


def _encode_string(value: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise NotPlainData(f"{where}: {value!r} is not valid Unicode; keep it as bytes") from None
    return value


def _encode_dict(value: Mapping[object, object], where: str, depth: int) -> object:
    if TAG not in value and all(type(key) is str for key in value):
        return {
            _encode_string(str(key), where): _encode(item, f"{where}.{key}", depth - 1) for key, item in value.items()
        }
    pairs = [
        [_encode(key, f"{where}, key {key!r}", depth - 1), _encode(item, f"{where}[{key!r}]", depth - 1)]
        for key, item in value.items()
    ]
    return {TAG: ["dict", pairs]}


def _decode(value: object, depth: int) -> object:
    if depth == 0:
        raise CorruptCheckpoint(f"plain data nested deeper than {DEPTH_MAX} levels")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_decode(item, depth - 1) for item in value]
    if isinstance(value, dict):
        if TAG in value:
            return _decode_tagged(value, depth)
        return {key: _decode(item, depth - 1) for key, item in value.items()}
    raise CorruptCheckpoint(f"plain data with a bare {type(value).__name__}, which is never written")


def _decode_tagged(value: Mapping[str, object], depth: int) -> object:
    body = value[TAG]
    if len(value) != 1 or not isinstance(body, list) or len(body) != 2:
        raise CorruptCheckpoint(f"plain data with a malformed tag: {str(body)[:80]}")
    kind, content = body
    try:
        match kind, content:
            case "int", str():
                return int(content, 16)
            case "float", str():
                return float(content)
            case "bytes", str():
                return base64.b64decode(content, validate=True)
            case "tuple", list():
                return tuple(_decode(item, depth - 1) for item in content)
            case "dict", list():
                return {_decode(key, depth - 1): _decode(item, depth - 1) for key, item in content}
    except (ValueError, TypeError, binascii.Error, OverflowError) as error:
        raise CorruptCheckpoint(f"plain data with a malformed {kind}: {error!s:.120}") from None
    raise CorruptCheckpoint(f"plain data with an unknown tag {str(kind)[:80]!r}")
