"""Ranks that hang are told from ranks that are only slow, and the run ends bit for bit where the unhurt run does.

Most of the time is waiting, so all runs go on at the same time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.launching.harness import Launcher, clusters
from tests.recovery.account import Job, launch
from tests.recovery.conftest import Reference
from tests.recovery.training import INJURIES

RUNS = {
    "stopped": [{"point": "step", "rank": 1, "step": 8, "how": "SIGSTOP"}],
    # In the forward pass: the other rank gets further within the same step, into a collective of the backward pass.
    "locked": [{"point": "forward", "rank": 1, "step": 8, "how": "deadlock"}],
    "in a collective": [{"point": "step", "rank": rank, "step": 8, "how": "wait for each other"} for rank in (0, 1)],
    "slow": [
        {"point": "forward", "rank": 1, "step": 0, "how": "warm up"},
        {"point": "step", "rank": 0, "step": 5, "how": "evaluate"},  # first: it makes the bounds for what follows wide
        {"point": "forward", "rank": 1, "step": 8, "how": "load slowly"},
        {"point": "forward", "rank": 1, "step": 9, "how": "collect garbage"},
    ],
    "resting": [{"point": "forward", "rank": 1, "step": 8, "how": "rest"}],
}


@dataclass(frozen=True)
class Run:
    job: Job
    launcher: Launcher

    def end(self, unhurt: Job) -> Run:
        """Wait for its end, which has to be the unhurt run's."""
        assert self.launcher.wait() == 0, self.launcher.text
        assert self.job.history() == unhurt.history()
        assert self.job.end() == unhurt.end()
        return self

    def interruptions(self) -> list[dict[str, Any]]:
        lines = (self.job.run_dir / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == "interruption"]

    def survivors(self) -> list[int]:
        lines = (self.job.run_dir / "events.jsonl").read_text().splitlines()
        return [event["survivors"] for event in map(json.loads, lines) if event["event"] == "continues"]


Runs = dict[str, Run]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, unhurt: Reference) -> Iterator[Runs]:
    """All of them, started."""
    unhurt("ddp")
    for cluster in clusters(tmp_path_factory.mktemp("hangs")):
        started = {}
        for name, injuries in RUNS.items():
            job = Job(cluster.path / name.replace(" ", "-"))
            started[name] = Run(job, launch(cluster, job, environment={INJURIES: json.dumps(injuries)}))
        yield started


def test_stopped_rank_is_killed_alone(runs: Runs, unhurt: Reference) -> None:
    run = runs["stopped"].end(unhurt("ddp"))
    [interruption] = run.interruptions()
    assert (interruption["class"], interruption["rank"]) == ("rank hung", 1)
    assert "was stopped (SIGSTOP)" in interruption["summary"]
    assert "in step 8" in interruption["summary"]
    assert run.survivors() == [1]


def test_rank_in_a_deadlock_is_killed_alone_and_says_where_it_was(runs: Runs, unhurt: Reference) -> None:
    run = runs["locked"].end(unhurt("ddp"))
    [interruption] = run.interruptions()
    assert (interruption["class"], interruption["rank"]) == ("rank hung", 1)
    assert "used no processor and did no I/O, while rank 0 waited" in interruption["summary"]
    assert "in step 8 (after broadcast" in interruption["summary"]
    assert "take_a_lock_twice" in interruption["traceback"]
    assert run.survivors() == [1]


def test_collective_that_hangs_is_ended_in_place(runs: Runs, unhurt: Reference) -> None:
    run = runs["in a collective"].end(unhurt("ddp"))
    [interruption] = run.interruptions()
    assert (interruption["class"], interruption["rank"]) == ("link cut", -1)
    assert "in or after recv" in interruption["summary"]
    assert run.survivors() == [2]


@pytest.mark.parametrize("name", ["slow", "resting"])
def test_slow_rank_is_not_taken_for_hung(runs: Runs, unhurt: Reference, name: str) -> None:
    run = runs[name].end(unhurt("ddp"))
    assert run.job.injuries() == len(RUNS[name])
    assert run.interruptions() == []


def test_leave_to_be_quiet_for_no_number_of_seconds_is_refused() -> None:
    script = "import ftrain; run = ftrain.join(); run.allow(5); run.allow(float('nan'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode != 0
    assert "UsageError: allow(nan): give the seconds that this rank may be quiet for" in done.stderr
