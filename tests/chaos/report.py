"""What came of a chaos: how it was hurt, what that cost, and what it must not have cost."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any

from tests.chaos.run import Chaos

WARM_FAULTS = 50  # in the life of a process: by then every code path was taken once
SAMPLES_MIN = 8  # since then, of one process: fewer say nothing
GROWTH_KIB_MAX = (
    32.0  # of resident memory, a fault: allocators take 1 MiB at a time; an arena, a group, a thread is more
)


@dataclass(frozen=True)
class Held:
    """What one process holds."""

    faults: int  # so far
    pid: int
    descriptors: int
    threads: int
    shared: int  # segments of shared memory
    resident_mib: float


@dataclass
class Leaks:
    """What processes held in the course of a chaos."""

    samples: dict[str, list[Held]] = field(default_factory=dict)

    def look(self, chaos: Chaos, faults: int) -> None:
        for name, pid in chaos.pids().items():
            if pid and (found := _held(pid, faults)) is not None:
                known = self.samples.setdefault(name, [])
                if known and known[-1].pid != pid:
                    known.clear()  # another process in its place
                known.append(found)

    def found(self) -> list[str]:
        """What grew, one line each."""
        lines = []
        for name, samples in self.samples.items():
            warm = [one for one in samples if one.faults >= samples[0].faults + WARM_FAULTS]
            if len(warm) < SAMPLES_MIN:
                continue
            # A recovery may be under way at any look: what is held for good is what most looks find.
            early, late = warm[: len(warm) // 2], warm[len(warm) // 2 :]
            for what in ("descriptors", "threads", "shared"):
                before, after = (median_low(getattr(one, what) for one in half) for half in (early, late))
                if after > before:
                    lines.append(f"{name}: {before} {what}, then {after}")
            grown = (late[-1].resident_mib - warm[0].resident_mib) * 1024 / (late[-1].faults - warm[0].faults)
            if grown > GROWTH_KIB_MAX:
                lines.append(f"{name}: {grown:.1f} KiB more of resident memory with each fault")
        return lines


@dataclass(frozen=True)
class Report:
    """All counts are of the whole run."""

    seed: int
    parallel: str
    nodes: int
    faults: int
    faults_by_kind: dict[str, int]
    generations: int
    recoveries: int
    recoveries_by_tier: dict[str, int]  # "": from the beginning
    in_place: int  # of the recoveries: with ranks that kept their processes
    steps: int
    redone_steps: int
    commits: int
    lost_commits: list[str]
    seconds: float
    leaks: list[str]
    held: dict[str, list[Held]]
    same: bool  # bit for bit as the unhurt run
    nothing_left: bool

    @property
    def good(self) -> bool:
        return self.same and self.nothing_left and not self.lost_commits and not self.leaks

    def encode(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def text(self) -> str:
        kinds = "\n".join(f"  {count:5}  {kind}" for kind, count in self.faults_by_kind.items())
        tiers = ", ".join(f"{count} from {tier or 'the beginning'}" for tier, count in self.recoveries_by_tier.items())
        lines = [
            f"{self.faults} faults in {self.seconds:.0f} s ({self.nodes} node(s), {self.parallel}, seed {self.seed}):",
            kinds,
            f"{self.recoveries} recoveries ({tiers}), {self.in_place} of them in place; {self.generations} generations",
            f"{self.steps} steps, {self.redone_steps} more done again; {self.commits} commits",
            f"lost commits: {'; '.join(self.lost_commits) or 'none'}",
            f"leaks: {'; '.join(self.leaks) or 'none'}",
            *(f"  {name}: {samples[0]} … {samples[-1]}" for name, samples in self.held.items()),
            f"bit for bit as the unhurt run: {self.same}; no process left: {self.nothing_left}",
        ]
        return "\n".join(lines)


def report(chaos: Chaos, leaks: Leaks, seconds: float, same: bool) -> Report:
    """Of a chaos that came to its end."""
    told = _events(chaos.job.run_dir / "events.jsonl", "continues")
    return Report(
        chaos.seed,
        chaos.parallel,
        chaos.shape.nodes,
        sum(chaos.done.values()),
        dict(chaos.done.most_common()),
        len(chaos.job.journal("generation")),
        len(told),
        dict(Counter(str(event["tier"]) for event in told).most_common()),
        sum(event["survivors"] > 0 for event in told),
        chaos.steps,
        sum(event["redone_steps"] for event in told),
        len(chaos.job.commits()),
        lost_commits(chaos.job.run_dir),
        round(seconds, 1),
        leaks.found(),
        leaks.samples,
        same,
        chaos.cluster.nothing_left(),
    )


def lost_commits(run_dir: Path) -> list[str]:
    """Where the run went back behind a commit, committed a step twice, or lost what it may still go on from."""
    found: list[str] = []
    newest, alive = 0, {}
    for path in sorted((run_dir / "journal").glob("*.json")):
        body: dict[str, Any] = json.loads(path.read_bytes())["record"]["body"]
        match body["kind"]:
            case "commit":
                attempt = body["attempt"]
                if attempt["step"] <= newest:
                    found.append(f"{path.name}: commit of step {attempt['step']} after that of step {newest}")
                newest = attempt["step"]
                alive[newest] = f"step-{newest:012d}/g{attempt['generation']:04d}-a{attempt['number']}"
            case "retire":
                alive.pop(body["attempt"]["step"])
            case "generation":
                resumes = body["resumes"]["step"] if body["resumes"] else 0
                if max(body["line_step"], resumes) < newest:
                    found.append(f"{path.name}: generation {body['generation']} went back behind step {newest}")
    missing = [name for name in alive.values() if not (run_dir / "checkpoints" / name / "manifest.json").exists()]
    return [*found, *(f"{name} is gone" for name in missing)]


def _events(path: Path, kind: str) -> list[dict[str, Any]]:
    # A disk that was full may have taken half a line.
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if event["event"] == kind:
            found.append(event)
    return found


def _held(pid: int, faults: int) -> Held | None:
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        shared = sum(" /memfd:" in line or " /dev/shm/" in line for line in maps)
        resident = int(status["VmRSS"].split()[0]) / 1024
        return Held(faults, pid, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]), shared, round(resident, 2))
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return None
