"""Plain data as MessagePack and back, exactly: quicker than a checkpoint's JSON, and read by this version alone."""

from __future__ import annotations

from typing import Any

import msgspec

from ftrain.core import plain as plain_data

_TUPLE, _PAIRS, _INTEGER = 1, 2, 3  # what MessagePack has not: extensions
_LEAVES = frozenset({type(None), bool, int, float, str, bytes})
_STRINGS = {str}
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1
_encode = msgspec.msgpack.Encoder().encode


def pack(value: object, where: str) -> bytes:
    """The bytes that `unpack` makes the value of again, types included.

    Raises `NotPlainData` as `core.plain.encode` does, with the key path of the value after `where`.
    """
    try:
        try:
            return _encode(_packable(value, _LEAVES))
        except OverflowError:  # there is an integer that MessagePack has not
            return _encode(_packable(value, _LEAVES - {int}))
    except (TypeError, RecursionError, UnicodeEncodeError):
        plain_data.encode(value, where)  # knows where
        raise


def unpack(data: bytes) -> Any:
    return _decode(data)


def _packable(value: Any, leaves: frozenset[type]) -> Any:
    kind = type(value)
    if kind in leaves:
        return value
    if kind is dict:
        if {*map(type, value)} <= _STRINGS:
            return {key: one if type(one) in leaves else _packable(one, leaves) for key, one in value.items()}
        pairs = [[_packable(key, leaves), _packable(one, leaves)] for key, one in value.items()]
        return msgspec.msgpack.Ext(_PAIRS, _encode(pairs))
    if kind is list or kind is tuple:
        items = [one if type(one) in leaves else _packable(one, leaves) for one in value]
        return items if kind is list else msgspec.msgpack.Ext(_TUPLE, _encode(items))
    if kind is int:
        fits = _INT_MIN <= value <= _INT_MAX
        return value if fits else msgspec.msgpack.Ext(_INTEGER, hex(value).encode())
    raise TypeError(f"a {kind.__qualname__} is no plain data")


def _extension(code: int, data: memoryview) -> object:
    if code == _INTEGER:
        return int(bytes(data), 16)
    found = _decode(bytes(data))
    return tuple(found) if code == _TUPLE else dict(found)


_decode = msgspec.msgpack.Decoder(ext_hook=_extension).decode
