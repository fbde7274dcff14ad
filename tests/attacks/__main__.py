"""Prints each attack of the corpus, and the refusal that it gets: `python -m tests.attacks`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import ftrain
from ftrain.errors import FtrainError
from tests.attacks import hostile
from tests.attacks.test_attacks import ATTACKS


def main() -> None:
    taken = 0
    print("| attack | refused by `ftrain.load` with |\n|---|---|")
    for name, attack in ATTACKS.items():
        with tempfile.TemporaryDirectory(prefix="ftrain-attack-") as directory:
            outside = Path(directory) / "outside"
            outside.mkdir()
            (outside / "secret").write_bytes(b"secret")
            path = hostile.checkpoint(Path(directory) / "checkpoint")
            attack(path, outside)
            try:
                ftrain.load(path, hostile.state())
            except FtrainError as error:
                said = f"{type(error).__name__}: {error}".replace(directory, "…").replace("|", "\\|")
            else:
                said, taken = "nothing: it was loaded", taken + 1
            print(f"| {name.replace('_', ' ')} | {said} |")
    sys.exit(1 if taken else 0)


if __name__ == "__main__":
    main()
