"""What the agent reads in a script before it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrain.agent import environment
from ftrain.spec import Program

JOINS = [
    "import ftrain\nrun = ftrain.join()",
    "import ftrain as ft\ndef main():\n    run = ft.join()",
    "from ftrain import join\njoin()",
    "def main():\n    from ftrain import Run, join as enter\n    enter()",
]
DOES_NOT = [
    "import torch\ntorch.nn.Linear(1, 1)",
    "import os\nos.path.join('a', 'b')\n','.join([])",
    "import ftrain\nftrain.save('checkpoint', {})",
    "from ftrain import FtrainError\n'.'.join([])",
    "import ftrain\nthis is no Python",
]


@pytest.mark.parametrize(("source", "joins"), [(x, True) for x in JOINS] + [(x, False) for x in DOES_NOT])
def test_script_that_calls_join_is_told_from_one_that_does_not(tmp_path: Path, source: str, joins: bool) -> None:
    script = tmp_path / "script.py"
    script.write_text(source)
    assert environment.joins(Program("script", str(script), ())) is joins


def test_program_that_is_not_python_is_not_read() -> None:
    assert not environment.joins(Program("exec", "sh", ("-c", "import ftrain; ftrain.join()")))


def test_script_that_is_gone_is_left_to_the_worker(tmp_path: Path) -> None:
    assert not environment.joins(Program("script", str(tmp_path / "gone.py"), ()))
