"""What a fine-tune writes: a real run refers to what is frozen, and goes on from it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from ftrain.checkpoint.catalogue import catalogue
from ftrain.checkpoint.load import open_checkpoint
from ftrain.checkpoint.tools.verify import verify

BENCH = Path(__file__).parent.parent / "bench" / "frozen.py"


@pytest.fixture
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_frozen", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_frozen_weights_of_a_real_run_are_written_once(tmp_path: Path, bench: ModuleType) -> None:
    rows = bench.measure(tmp_path / "run", mebibytes=8, commits=2)
    assert [row["refers"] for row in rows] == [[], [10]]
    shares = [row["written_bytes"] / row["full_bytes"] for row in rows]
    assert shares[0] > 1.0
    assert 0.09 < shares[1] < 0.12
    assert open_checkpoint(tmp_path / "run").step == 20
    for commit in catalogue(str(tmp_path / "run")).commits:
        assert verify(commit).strange == ()
