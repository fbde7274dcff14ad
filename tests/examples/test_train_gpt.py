"""The example runs wherever a PyTorch script runs: alone, and under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_gpt.py"
SMALL = ["--steps", "4", "--layers", "1", "--width", "32", "--heads", "2", "--context", "32", "--batch", "2"]


def train(command: list[str], digest: Path, *more: str) -> str:
    done = subprocess.run(
        [*command, str(EXAMPLE), *SMALL, "--validate-every", "2", "--digest", str(digest), *more],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stderr


def test_example_alone_says_that_it_takes_no_checkpoints_and_is_reproducible(tmp_path: Path) -> None:
    first = train([sys.executable], tmp_path / "first")
    assert "no checkpoints" in first
    train([sys.executable], tmp_path / "second")
    assert len((tmp_path / "first").read_text()) == 64
    assert (tmp_path / "first").read_text() == (tmp_path / "second").read_text()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_example_under_torchrun_trains_to_its_end(tmp_path: Path, parallel: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train(torchrun, tmp_path / "digest", "--parallel", parallel)
    assert len((tmp_path / "digest").read_text()) == 64
