"""One parser under atheris: `python -m tests.fuzz.coverage TARGET -max_total_time=60`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ftrain.core", "ftrain.control.channel", "ftrain.agent.peer_wire"]):
    from tests.fuzz.targets import execute, samples


def main() -> None:
    target = sys.argv.pop(1)
    with tempfile.TemporaryDirectory(prefix="ftrain-fuzz-") as corpus:
        for number, data in enumerate(samples(target)):
            (Path(corpus) / str(number)).write_bytes(data)
        atheris.Setup([*sys.argv, corpus], lambda data: execute(target, data) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
