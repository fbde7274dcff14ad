"""What came of a chaos: how it was hurt, what that cost, and what it must not have cost."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.chaos.leaks import Held, Leaks
from tests.chaos.run import Chaos


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
    table: list[str]  # of what was held, to be read
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
            *self.table,
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
        leaks.table(),
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
