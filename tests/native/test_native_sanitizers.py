"""The engine's C++ tests under sanitizers: no report. `make sanitize` does the same."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "cpp"


def lacks(sanitizers: str, folder: Path) -> str:
    """Why programs cannot be built and run with these sanitizers here; empty where they can."""
    if shutil.which("g++") is None or shutil.which("make") is None:
        return "there is no g++ or no make"
    (folder / "empty.cpp").write_text("int main() {}")
    build = ["g++", f"-fsanitize={sanitizers}", "-o", str(folder / "empty"), str(folder / "empty.cpp")]
    for command in (build, [str(folder / "empty")]):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            return f"{command[0]} failed: {done.stderr[-500:]}"
    return ""


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_native_programs_run_without_a_report(tmp_path: Path, sanitizers: str) -> None:
    if reason := lacks(sanitizers, tmp_path):
        pytest.skip(reason)
    command = ["make", "-C", str(PROGRAMS), f"-j{os.cpu_count()}", f"SANITIZE={sanitizers}", f"OUT={tmp_path}"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=280, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count(f"{sanitizers}: ") == len(list(PROGRAMS.glob("*_test.cpp")))
