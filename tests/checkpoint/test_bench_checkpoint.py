"""bench/checkpoint runs at a tiny scale, says who failed, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

BENCH = Path(__file__).parents[2] / "bench" / "checkpoint"
TINY = ["--scale", "0.0003", "--repeats", "1", "--steps", "2", "--dtypes", "fp32"]
IN_MEMORY = Path("/dev/shm")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder that the benchmark accepts."""
    fstype = max(
        (part for part in psutil.disk_partitions(all=True) if tmp_path.is_relative_to(part.mountpoint)),
        key=lambda part: len(part.mountpoint),
    ).fstype
    if fstype in ("tmpfs", "ramfs"):
        pytest.skip(f"{tmp_path} is on {fstype}: the benchmark measures disks")
    return tmp_path


def command(disk: Path, *more: str) -> list[str]:
    return [sys.executable, str(BENCH), *TINY, "--dir", str(disk), *more]


def measured(disk: Path, *more: str, descriptors: int = 4096) -> tuple[dict[str, Any], str]:
    """The figures of a run and its report; nothing but the figures is left in the folder."""
    figures = disk / "figures.json"
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n "$0" && exec "$@"', str(descriptors), *command(disk, "--json", str(figures), *more)],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert list(disk.iterdir()) == [figures]
    return json.loads(figures.read_text()), done.stdout


def installed(*names: str) -> set[str]:
    return {name for name in names if importlib.util.find_spec(name) is not None}


def test_all_phases_measure_every_installed_subject_and_nobody_fails(disk: Path) -> None:
    found, report = measured(
        disk, "--workloads", "gpt", "--ranks", "1", "--subjects", "ftrain", "torch.", "safetensors", "TensorStore"
    )
    assert found["failures"] == []
    subjects = {"ftrain", "torch.save"} | installed("safetensors")
    subjects |= {"TensorStore"} if installed("tensorstore") else set()
    for measure in ("save", "load cold", "load warm", "memory"):
        assert subjects <= {r["subject"] for r in found["records"] if r["measure"] == measure}, measure
    for measure in ("stall", "train"):
        assert {r["subject"] for r in found["records"] if r["measure"] == measure} == {"ftrain"}, measure
    limits = {r["subject"] for r in found["records"] if r["measure"].startswith("limit of")}
    assert {"direct write", "direct read", "page cache", "memcpy", "memcpy into shared"} <= limits
    for title in ("Limits", "Durable save", "Load, cold", "Load, warm", "Stall", "Training", "Resident memory"):
        assert f"### {title}" in report


def test_two_ranks_save_and_load_many_small_tensors(disk: Path) -> None:
    found, _ = measured(
        disk, "--workloads", "many", "--ranks", "2", "--phases", "save", "load", "--subjects", "ftrain", "DCP", "zarr"
    )
    assert found["failures"] == []
    for measure in ("save", "load cold", "load warm"):
        names = [r["subject"] for r in found["records"] if r["measure"] == measure]
        assert sorted(names) == ["DCP", "ftrain", "zarr-python"]


def test_subject_out_of_descriptors_is_reported_and_the_others_go_on(disk: Path) -> None:
    # DCP's process mode hands every tensor over by a descriptor of its own; torch.save needs a few in all.
    found, report = measured(
        disk,
        *("--workloads", "many", "--scale", "0.01", "--ranks", "1", "--phases", "save", "stall"),
        *("--subjects", "torch.save", "DCP async, process", "--bound", "20"),
        descriptors=150,
    )
    assert {failure["subject"] for failure in found["failures"]} >= {"DCP async, process"}
    assert "stall: DCP async, process is left out" in report
    assert [r["subject"] for r in found["records"] if r["measure"] == "save"] == ["torch.save"]


@pytest.mark.skipif(not IN_MEMORY.is_dir(), reason="there is no /dev/shm")
def test_folder_in_memory_is_refused_with_one_line() -> None:
    done = subprocess.run(command(IN_MEMORY), check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert (
        done.stderr
        == f"bench/checkpoint: {IN_MEMORY} is on tmpfs, which is memory: give a folder on a disk with --dir\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_bench_leaves_neither_process_nor_file(disk: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        command(
            disk, "--workloads", "gpt", "--repeats", "1000", "--ranks", "2", "--phases", "save", "--subjects", "DCP"
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as bench:
        try:
            assert bench.stderr is not None
            assert ": save" in bench.stderr.readline()
            children = psutil.Process(bench.pid).children(recursive=True)
            os.kill(bench.pid, number)
            assert bench.wait(timeout=60) == 128 + number
        finally:
            bench.kill()
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert list(disk.iterdir()) == []
