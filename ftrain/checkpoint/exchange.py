"""What ranks tell each other of their state: the tensors that each holds, and those that each asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from ftrain.core import plain as plain_data
from ftrain.core.layout import TensorSpec

Exchange = Callable[[bytes], list[bytes]]  # gives every rank what each gave, by rank: a collective

_SPECS = msgspec.json.Decoder(list[TensorSpec])
_KEYS = msgspec.json.Decoder(list[str])


def encode_plain(plain: Mapping[str, object]) -> dict[str, Any]:
    return {name: plain_data.encode(value, name) for name, value in plain.items()}


def encode_specs(specs: Sequence[TensorSpec]) -> bytes:
    return msgspec.json.encode(specs)


def exchange_specs(
    specs: list[TensorSpec], encoded: bytes, exchange: Exchange, rank: int
) -> tuple[list[list[TensorSpec]], list[bytes]]:
    """Everybody's specs, and the digests of them, by rank; `encoded` is this rank's by `encode_specs`.

    Digests go first: usually all are equal, and then nothing else needs to travel.
    """
    digests = exchange(hashlib.sha256(encoded).digest())
    known: dict[bytes, list[TensorSpec]] = {digests[rank]: specs}
    if len(set(digests)) > 1:
        first = digests.index(digests[rank]) == rank
        contents = exchange(encoded if first else b"")
        for digest, content in zip(digests, contents, strict=True):
            if content and digest not in known:
                known[digest] = _SPECS.decode(content)
    return [known[digest] for digest in digests], digests


def asked_by_others(missed: Collection[str], asked: Collection[str], exchange: Exchange) -> set[str]:
    """What all ranks together ask a checkpoint for, where one of them misses a key of it. A collective.

    Stages of a pipeline hold different tensors. Empty where no rank misses any.
    """
    if not any(exchange(b"x" if missed else b"")):
        return set()
    return {key for keys in exchange(msgspec.json.encode(list(asked))) for key in _KEYS.decode(keys)}
