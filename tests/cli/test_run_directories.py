"""Where a run is kept that was not told where."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrain.cli import launch
from ftrain.spec import Program, Topology


@pytest.mark.parametrize(
    ("kind", "target", "name"),
    [
        ("script", "somewhere/train.v2.py", "train.v2"),
        ("module", "package.scripts.train", "package.scripts.train"),
        ("exec", "bin/my program", "my_program"),
    ],
)
def test_run_directory_that_nobody_named_is_called_after_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, target: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    url, place = launch._run_dir("", None, Topology(1, 1, 0, 1), Program(kind, target, ()))
    assert (url, place.name.rsplit("-", 3)[0]) == ("", name)
    assert place.is_dir()
