"""The benchmark of object stores runs on a real server, and compares with the limit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench" / "store.py"


def test_saving_and_loading_on_a_store_are_measured_beside_its_limit() -> None:
    command = [sys.executable, str(BENCH), "--mebibytes", "4", "--repeats", "1", "--subjects", "ftrain"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode == 69:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    number = r"[0-9.]+ \([0-9.]+-[0-9.]+\)"
    assert re.search(rf"\| the limit \(obstore\) \| {number} s \| 1 \| {number} s \| 1 \|", done.stdout)
    assert re.search(rf"\| ftrain \| {number} s \| {number} \| {number} s \| {number} \|", done.stdout)
