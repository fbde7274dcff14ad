"""Names that keep a commit's files: `pins/<name>/pin.json` in the run's directory.

They are files of their own, not records of the journal, because who pins is usually not the run's coordinator, and a
record by anybody else would end it. Nothing is lost in between: who pins writes the pin and then looks whether the
journal has let go of the commit; who removes has written to the journal that it lets go and then looks for pins. One
of the two sees the other.
"""

from __future__ import annotations

import re

import msgspec

from ftrain.core.messages import Attempt
from ftrain.errors import CorruptCheckpoint, NotFound, UsageError
from ftrain.storage.base import Storage, create_once

DIRECTORY = "pins"
KEPT = "kept"  # what `save` wrote there under a name: retention looks at `checkpoints` only
PIN_BYTES_MAX = 64 << 10
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A commit that stays, and why."""

    attempt: Attempt
    why: str = ""


_PIN = msgspec.json.Decoder(Pin)


def pin(storage: Storage, name: str, attempt: Attempt, why: str) -> None:
    """Keep the files of a commit, durably, under a name. Raises `UsageError` where that is taken for another one.

    The caller then looks whether the journal still has that commit.
    """
    if not is_pin_name(name):
        raise UsageError(f"{name!r}: a pin's name has letters, digits, '_', '-' and '.', and begins with a letter")
    data = msgspec.json.encode(Pin(attempt, why)) + b"\n"
    path = _path(name)
    if not create_once(storage, path, data):
        raise UsageError(f"{storage.url}/{path}: this name is taken by another pin; choose one that is not")


def is_pin_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def unpin(storage: Storage, name: str) -> None:
    """No error where there is none of this name."""
    storage.remove_tree(f"{DIRECTORY}/{name}")


def pins(storage: Storage) -> dict[str, str]:
    """The path of each pinned commit, by the pin's name. Raises `CorruptCheckpoint` for what is no pin."""
    found = {}
    for name in storage.list(DIRECTORY):
        where = f"{storage.url}/{_path(name)}"
        try:
            data = storage.read(_path(name))
        except NotFound:
            continue  # unpinned meanwhile
        if len(data) > PIN_BYTES_MAX:
            raise CorruptCheckpoint(f"{where}: a pin of {len(data)} bytes is over the limit of {PIN_BYTES_MAX}")
        try:
            found[name] = _PIN.decode(data).attempt.path
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CorruptCheckpoint(f"{where}: not a pin: {error}; remove it if it is not needed") from None
    return found


def _path(name: str) -> str:
    return f"{DIRECTORY}/{name}/pin.json"
