"""Where the time of one snapshot and one persist goes, in the steady state: the steps of `ftrain.async_save`.

A GPT-like state with AdamW's moments is saved again and again, with nothing else to do. The median of each step over
the repeats is printed, and the page faults. docs/profile.md has the figures, and how often each byte is touched.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import ftrain
from ftrain.checkpoint import async_save as engine
from ftrain.checkpoint.staging import stage
from ftrain.checkpoint.staging.stage import Stager, Staging
from ftrain.checkpoint.writing import target as commits
from ftrain.checkpoint.writing.agreement import Plans
from ftrain.checkpoint.writing.job import Jobs
from ftrain.storage.posix import PosixStorage

# What is timed, in the order in which it happens: (class or module, function, what it does, who does it).
STEPS: list[tuple[Any, str, str, str]] = [
    (Jobs, "job", "walk the state, encode plain data", "training thread"),
    (Plans, "known", "find the plan of last time", "training thread"),
    (engine._Engine, "_take_slot", "take a slot of the arena", "training thread"),
    (Stager, "begin", "look at pointers and versions, begin to copy", "training thread"),
    (stage, "look", "of it: look where tensors lie (of 2048 and more, a thread does that later)", "training thread"),
    (Staging, "finish", "copy every byte into the arena, compare versions", "copy thread"),
    (commits.Target, "_prepare", "look whether the path is free", "writer"),
    (PosixStorage, "write_pack", "write the pack past the page cache, checksums on the way, sync", "writer"),
    (PosixStorage, "create", "create the small files (metadata, index, references, manifest), sync", "writer"),
    (Staging, "settle", "compare versions once more, just before the commit", "writer"),
    (commits.Target, "commit", "all of the persist", "writer"),
]


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Every call of the steps adds to its time."""
    real = [(owner, name, getattr(owner, name)) for owner, name, _, _ in STEPS]

    def watch(label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def watched(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                seconds[label] += time.perf_counter() - began

        return watched

    for (owner, name, call), (_, _, label, _) in zip(real, STEPS, strict=True):
        setattr(owner, name, watch(label, call))
    try:
        yield
    finally:
        for owner, name, call in real:
            setattr(owner, name, call)


def state_of(nbytes: int, tensors: int) -> dict[str, Any]:
    """Parameters and two moments each, float32."""
    each = nbytes // tensors // 4
    named = {f"layer{number}.weight": torch.randn(each) for number in range(tensors // 3)}
    moments = {f"{key}.{kind}": torch.randn(each) for key in named for kind in ("exp_avg", "exp_avg_sq")}
    return {"model": named, "optimizer": moments}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bytes", type=float, default=2e9)
    parser.add_argument("--tensors", type=int, default=450)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="on the disk that is to be measured")
    args = parser.parse_args()
    state = state_of(int(args.bytes), args.tensors)
    nbytes = sum(tensor.nbytes for part in state.values() for tensor in part.values())
    found: dict[str, list[float]] = defaultdict(list)
    faults = []
    with tempfile.TemporaryDirectory(prefix="ftrain-profile-", dir=args.dir) as directory:
        for number in range(args.repeats + 2):
            seconds: dict[str, float] = defaultdict(float)
            before = resource.getrusage(resource.RUSAGE_SELF)
            with timed(seconds):
                saving = ftrain.async_save(f"{directory}/{number}", state, step=number)
                called = saving.stall_seconds
                saving.result()
            after = resource.getrusage(resource.RUSAGE_SELF)
            if number < 2:
                continue  # the first ones make plans and memory
            faults.append(after.ru_minflt - before.ru_minflt)
            seconds["the call, as the training thread sees it"] = called
            for label, value in seconds.items():
                found[label].append(value)
            for path in Path(directory, str(number)).rglob("*"):
                if path.is_file():
                    path.unlink()
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), torch {torch.__version__}"
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine}")
    print(f"{nbytes / 1e9:.2f} GB in {args.tensors} tensors, {args.repeats} repeats; medians\n")
    print("| step | by | time | bytes a second |\n|---|---|---|---|")
    for _, _, label, who in STEPS:
        if found[label]:  # some are done only for many tensors, others only for few
            print(row(label, who, statistics.median(found[label]), nbytes))
    label = "the call, as the training thread sees it"
    print(row(label, "training thread", statistics.median(found[label]), 0))
    print(f"\npage faults per save: {statistics.median(faults):.0f} (of {nbytes // 4096} pages)")


def row(label: str, who: str, seconds: float, nbytes: int) -> str:
    moves = nbytes if any(word in label for word in ("copy every byte", "write the pack")) else 0
    rate = f"{moves / seconds / 1e9:.1f} GB/s" if moves else "-"
    return f"| {label} | {who} | {seconds * 1e3:.2f} ms | {rate} |"


if __name__ == "__main__":
    main()
