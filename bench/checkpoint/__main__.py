"""Saving and loading: ftrain beside DCP, torch.save, safetensors, zarr-python, TensorStore, and beside the limits.

A process per rank and subject. They have their turns one by one, so that what drifts hits all; see bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from files import RefusedError, file_system, refuse_memory
from phases import PHASES, Bench, LimitError
from report import Report
from states import Workload
from subjects import SUBJECTS, Subject
from team import end_descendants

PACKAGES = ("ftrain", "torch", "safetensors", "tensorstore", "zarr")


def main() -> None:
    args = parse()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    try:
        refuse_memory(args.dir)
        run(args)
    except (RefusedError, LimitError) as error:
        sys.exit(f"bench/checkpoint: {error}")


def interrupted(number: int, _: object) -> NoReturn:
    """End in order; a second signal does not come between."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def run(args: argparse.Namespace) -> None:
    subjects, missing = chosen(args.subjects)
    found: dict[str, Any] = {"machine": machine(args.dir), "arguments": [*sys.argv[1:]], "missing": missing}
    print(heading(found))
    benches: list[Bench] = []
    with tempfile.TemporaryDirectory(prefix="ftrain-bench-", dir=args.dir) as folder:
        for number, workload in enumerate(workloads(args)):
            with bench(workload, subjects, Path(folder) / str(number), args) as made:
                benches.append(made)
                for phase in args.phases:
                    print(f"{datetime.now(UTC):%H:%M:%S} {workload}: {phase}", file=sys.stderr)
                    made.run(phase)
            print(f"\n{report(made, subjects)}", flush=True)
            if args.json:
                found["records"] = [record.as_json() for one in benches for record in one.records]
                found["failures"] = [asdict(failure) for one in benches for failure in one.failures]
                args.json.write_text(json.dumps(found, indent=1))


@contextlib.contextmanager
def bench(workload: Workload, subjects: list[Subject], folder: Path, args: argparse.Namespace) -> Iterator[Bench]:
    folder.mkdir()
    made = Bench(workload, subjects, folder, args.repeats, args.bound, args.steps)
    try:
        yield made
    finally:
        made.close()
        end_descendants()


def report(bench: Bench, subjects: list[Subject]) -> Report:
    tensors = sum(len(bench.workload.shapes_of(rank)) for rank in range(bench.workload.ranks))
    title = str(bench.workload)
    return Report(title, bench.total_bytes, tensors, bench.dropped_by, bench.records, bench.failures, subjects)


def workloads(args: argparse.Namespace) -> list[Workload]:
    """The GPT in each type, the many small tensors once."""
    kinds = [("gpt", dtype) for dtype in args.dtypes if "gpt" in args.workloads]
    kinds += [("many", "fp32")] if "many" in args.workloads else []
    return [Workload(kind, dtype, ranks, args.scale) for ranks in args.ranks for kind, dtype in kinds]


def chosen(names: list[str] | None) -> tuple[list[Subject], dict[str, str]]:
    """The subjects to compare, and those that are not installed with what they lack."""
    wanted = [s for s in SUBJECTS if names is None or any(s.name.lower().startswith(name.lower()) for name in names)]
    missing = {subject.name: ", ".join(subject.missing()) for subject in wanted if subject.missing()}
    return [subject for subject in wanted if subject.name not in missing], missing


def machine(folder: Path) -> dict[str, Any]:
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "cpu": f"{len(os.sched_getaffinity(0))} of {cpu[0] if cpu else platform.machine()}",
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "file_system": file_system(folder),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.is_available(),
        "packages": packages,
    }


def heading(found: dict[str, Any]) -> str:
    about = found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    hardware = f"{about['cpu']}, {about['memory_bytes'] / 2**30:.0f} GiB, Linux {about['kernel']}"
    lines = [
        "# Checkpoints",
        "",
        f"{about['date']}, {hardware}, {about['file_system']}, load {about['load']:.1f}; {packages}.",
        f"`python bench/checkpoint {' '.join(found['arguments'])}`",
        "",
        "Medians (smallest to largest). A ratio is taken in each repeat, with the mean of the limits measured before",
        "and after, and then the median of the ratios. One thread per rank computes and copies (OMP_NUM_THREADS=1).",
    ]
    lines += [f"Not installed, so left out: {name} (lacks {what})." for name, what in found["missing"].items()]
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench/checkpoint: {message}\n")


def parse() -> argparse.Namespace:
    parser = Parser(prog="bench/checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workloads", nargs="+", choices=("gpt", "many"), default=["gpt", "many"])
    add("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="of the GPT")
    add("--ranks", nargs="+", type=positive, default=[1, 2])
    add("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    add("--subjects", nargs="+", metavar="NAME", help="only those whose names begin so; default all")
    add("--repeats", type=positive, default=5)
    add("--scale", type=float, default=1.0, help="of the state: 0.01 for a quick look")
    add("--steps", type=positive, default=8, help="training steps without a save, to compare those with one to")
    add("--bound", type=float, default=180.0, metavar="SECONDS", help="a subject that takes longer is left out")
    add("--dir", type=Path, default=Path.cwd(), help="where to write: a folder on the disk to be measured")
    add("--json", type=Path, metavar="FILE", help="all single figures")
    args = parser.parse_args()
    if not 0 < args.scale <= 10:
        parser.error(f"--scale {args.scale} is not between 0 and 10")
    if not args.dir.is_dir():
        parser.error(f"--dir {args.dir} is not a folder")
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


if __name__ == "__main__":
    main()
