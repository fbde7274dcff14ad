"""A sample of all single-bit flips and truncations; `python -m tests.attacks.flips` tries every one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks.flips import LAYOUTS, files_of, flip_all


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flipped_bits_and_cut_files_are_noticed_or_harmless(tmp_path: Path, layout: str) -> None:
    run = LAYOUTS[layout](tmp_path)
    index = next(run.path.rglob("00000.index.json")).read_bytes()
    assert (b'"codec":"blosc-zstd:3"' in index) == (layout == "compressed")
    names = [str(path.relative_to(tmp_path)).split("/") for path in files_of(run)]
    assert ["disk" in name for name in names].count(True) == (layout == "disks")
    assert [path.is_symlink() for path in files_of(run)].count(True) == (layout == "disks")
    counts, slipped = flip_all(run, every=997)
    assert not slipped
    assert counts["refused by load"] > 20
    assert counts["found by verify"] > 50
