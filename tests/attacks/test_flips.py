"""A sample of all single-bit flips and truncations; `python -m tests.attacks.flips` tries every one."""

from __future__ import annotations

from pathlib import Path

from tests.attacks.flips import flip_all, make_run


def test_flipped_bits_and_cut_files_are_noticed_or_harmless(tmp_path: Path) -> None:
    counts, slipped = flip_all(make_run(tmp_path), every=611)
    assert not slipped
    assert counts["refused by load"] > 20
    assert counts["found by verify"] > 50
