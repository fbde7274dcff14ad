"""Checkpoints of every mesh and placement into every other, with real ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.ranks import together
from tests.checkpoint.reshardings import LAYOUTS, load_each, save_each

HERE = "tests.checkpoint.reshardings"


@pytest.fixture
def saved() -> Iterator[Path]:
    """A directory whose syncs cost nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="ftrain-test-") as path:
        yield Path(path)


def test_what_any_layout_saved_any_other_loads_bit_for_bit(tmp_path: Path, saved: Path) -> None:
    pairs = 0
    for phase in ("save_each", "load_each"):
        for world_size in (2, 4):
            (meeting := tmp_path / f"{phase}-{world_size}").mkdir()
            done = together(meeting, world_size, f"{HERE}:{phase}", folder=str(saved), size=world_size)
            pairs += done[0] or 0
        if phase == "save_each":
            save_each(0, str(saved), 1)
    pairs += load_each(0, str(saved), 1)
    layouts = sum(map(len, LAYOUTS.values()))
    assert pairs == layouts * (layouts + 1)


def test_strided_shards_go_the_ways_that_other_shards_go(tmp_path: Path, saved: Path) -> None:
    together(tmp_path, 4, f"{HERE}:exchange", folder=str(saved))
