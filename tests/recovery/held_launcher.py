"""`ftrain`, which waits at places of its saving while a test holds it there: with the file PLACE-hold, in HELD.

What waits says so with the file PLACE-held.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ftrain.agent import coordinator_host, saver
from ftrain.cli.main import main

HELD = "FTRAIN_TEST_HELD"
PACK, MANIFEST = "pack", "manifest"  # before any rank's pack, before the manifest


class Holds:
    """The test's side."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir()

    @property
    def environment(self) -> dict[str, str]:
        return {HELD: str(self._path)}

    def hold(self, place: str) -> None:
        (self._path / f"{place}-hold").touch()

    def is_held(self, place: str) -> bool:
        return (self._path / f"{place}-held").exists()

    def let_go(self, place: str) -> None:
        (self._path / f"{place}-hold").unlink()


def _at(place: str) -> None:
    path = Path(os.environ[HELD])
    while (path / f"{place}-hold").exists():
        (path / f"{place}-held").touch()
        time.sleep(0.01)


def _holding() -> None:
    persist, publish = saver.persist_slot, coordinator_host.publish

    def held_persist(*arguments: Any) -> Any:
        _at(PACK)
        return persist(*arguments)

    def held_publish(*arguments: Any) -> str:
        _at(MANIFEST)
        return publish(*arguments)

    saver.persist_slot = held_persist
    coordinator_host.publish = held_publish


if __name__ == "__main__":
    _holding()
    main()
