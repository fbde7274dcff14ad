from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ftrain.checkpoint.staging import memory


def test_the_tightest_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = next(
        (line[4:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::/")), None
    )
    if own is None:
        pytest.skip("no control groups of version 2 here")
    group = tmp_path / own
    group.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("memory.max", "9000"),
        ("memory.current", "5000"),
        ("memory.stat", "anon 1\ninactive_file 10\n"),
    ):
        (group / name).write_text(content)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    assert memory.available_bytes() == 4010
    (group / "memory.max").write_text("max\n")
    assert memory.available_bytes() > 4010


def test_the_agents_side_needs_neither_torch_nor_numpy_nor_zarr() -> None:
    code = (
        "import sys, ftrain.checkpoint.writing.persist, ftrain.checkpoint.publish, ftrain.checkpoint.retain\n"
        "assert not {'torch', 'numpy', 'zarr'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
