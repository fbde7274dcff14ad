"""A sample of all single-bit flips and truncations; `python -m tests.attacks.flips` tries every one."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrain.core import frames
from tests.attacks.flips import flip_all, make_run


def test_flipped_bits_and_cut_files_are_noticed_or_harmless(tmp_path: Path) -> None:
    counts, slipped = flip_all(make_run(tmp_path), every=611)
    assert not slipped
    assert counts["refused by load"] > 20
    assert counts["found by verify"] > 50


def test_flipped_bits_and_cut_files_of_a_compressed_checkpoint_are_noticed_or_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "PLAIN_BYTES_MAX", 64)
    run = make_run(tmp_path, "blosc-zstd")
    assert b'"codec":"blosc-zstd:3"' in next(run.rglob("*.index.json")).read_bytes()
    counts, slipped = flip_all(run, every=611)
    assert not slipped
    assert counts["refused by load"] > 20
    assert counts["found by verify"] > 50
