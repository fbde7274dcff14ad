"""What a training wrote about itself, and what its run directory says."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrain.control.client import fetch_status
from ftrain.control.secret import Secret
from tests.launching.harness import Cluster, Launcher, wait_for
from tests.recovery import training

STEPS = 24


@dataclass(frozen=True)
class Step:
    number: int
    generation: int
    rank: int
    samples: tuple[int, ...]
    began: str  # digest of the state before it
    ended: str
    pid: int


@dataclass(frozen=True)
class Job:
    """One run: its directory, and the directory of its account."""

    path: Path

    @property
    def run_dir(self) -> Path:
        return self.path / "run"

    @property
    def out(self) -> Path:
        return self.path / "out"

    def copy(self, path: Path) -> Job:
        """The same run at the same point, to be continued in another way."""
        shutil.copytree(self.path, path, dirs_exist_ok=True)
        return Job(path)

    def steps(self) -> list[Step]:
        """Every step that a rank finished, by generation and rank, in order. Rehearsals do not count."""
        found = []
        for path in sorted(self.out.glob("steps-*.jsonl")):
            rank = int(path.stem.partition("-r")[2])
            # A line is written at once; the last one may be torn all the same when its writer was killed.
            lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if len(lines) > 1 and lines[0]["step"] == lines[1]["step"]:
                del lines[0]
            found += [
                Step(x["step"], x["generation"], rank, tuple(x["samples"]), x["began"], x["ended"], x["pid"])
                for x in lines
            ]
        return found

    def done(self, rank: int = 0) -> int:
        """How many steps the rank has finished."""
        return max((step.number + 1 for step in self.steps() if step.rank == rank), default=0)

    def history(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """The samples of each (step, rank) as it counts in the end: what was done last."""
        return {(step.number, step.rank): step.samples for step in self.steps()}

    def samples(self) -> list[list[int]]:
        """The samples of each step over all ranks, as they count in the end."""
        last = {step.number: step.generation for step in self.steps()}
        found: dict[int, list[int]] = {number: [] for number in sorted(last)}
        for step in self.steps():
            if step.generation == last[step.number]:
                found[step.number] += step.samples
        return [sorted(samples) for samples in found.values()]

    def end(self) -> list[dict[str, Any]]:
        """By rank, what it held at the end."""
        return [json.loads(path.read_text()) for path in sorted(self.out.glob("end-r*.json"))]

    def journal(self, kind: str) -> list[dict[str, Any]]:
        paths = sorted((self.run_dir / "journal").glob("*.json"))
        bodies = [json.loads(path.read_bytes())["record"]["body"] for path in paths]
        return [body for body in bodies if body["kind"] == kind]

    def commits(self) -> list[int]:
        """The steps of all commits that the run ever made."""
        return [body["attempt"]["step"] for body in self.journal("commit")]

    def checkpoints(self) -> list[Path]:
        """The checkpoints that are there, the oldest first."""
        return sorted(self.run_dir.glob("checkpoints/step-*/g*"))

    def done_at(self, checkpoint: Path) -> int:
        """The steps that were finished when the checkpoint was taken."""
        return int(checkpoint.parent.name.removeprefix("step-"))

    def status(self) -> dict[str, Any]:
        """What the coordinator of the running job says."""
        port = json.loads((self.run_dir / "coordinator.json").read_text())["port"]
        return asyncio.run(fetch_status(f"127.0.0.1:{port}", Secret.load(self.run_dir / "secret.pem")))

    def injuries(self) -> int:
        return len(list(self.out.glob("injury-*")))


def committed(launcher: Launcher, steps: int) -> None:
    """Wait until so many steps, or more, are committed: a busy machine skips the commits that it has no time for."""

    def there() -> bool:
        return any(int(found) >= steps for found in re.findall(r"checkpoint of step (\d+) committed", launcher.text))

    wait_for(lambda: there() or launcher.process.poll() is not None, f"a commit of {steps} steps")
    assert there(), launcher.text


def arguments(job: Job, parallel: str, steps: int, *more: object) -> tuple[object, ...]:
    """For `ftrain launch`: the run directory, the script and its arguments."""
    script = (training.__file__, "--out", job.out, "--parallel", parallel, "--steps", steps)
    return ("--run-dir", job.run_dir, *script, *more)


def launch(
    cluster: Cluster,
    job: Job,
    parallel: str = "ddp",
    *,
    ranks: int = 2,
    every: object = 3,
    flags: Sequence[object] = (),
    steps: int = STEPS,
    more: Sequence[object] = (),
    environment: dict[str, str] | None = None,
) -> Launcher:
    """Start or continue the job on one node."""
    own = ("--nproc-per-node", ranks, "--checkpoint-every", every, *flags)
    return cluster.launch(*own, *arguments(job, parallel, steps, *more), environment=environment)
