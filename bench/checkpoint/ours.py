"""ftrain, by its public names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import held
from states import State

import ftrain


class Ftrain:
    def __init__(self, rank: int, ranks: int) -> None:
        del rank, ranks  # it asks torch.distributed

    def save(self, path: Path, state: State) -> None:
        ftrain.save(path, state)

    def load(self, path: Path, state: State) -> None:
        ftrain.load(path, state)

    def begin(self, path: Path, state: State) -> FtrainPending:
        return FtrainPending(ftrain.async_save(path, state))

    def restore_held(self, path: Path, state: State, check: bool) -> dict[str, Any]:
        return held.restore(path, state, check)

    def close(self) -> None:
        """The arena stays for the next save."""


class FtrainPending:
    def __init__(self, saving: ftrain.Saving) -> None:
        self._saving = saving

    def before_step(self) -> None:
        """Optimizers wait by themselves."""

    def done(self) -> bool:
        return self._saving.done()

    def result(self) -> None:
        self._saving.result()
