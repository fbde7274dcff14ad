"""The simulator finds nothing in the core, finds every planted bug, and is the same every time.

The hundred thousand schedules are run by hand: `python -m tests.simulator --schedules 100000`.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.simulator import bugs
from tests.simulator.batch import run_batch, trace
from tests.simulator.plan import calm, draw
from tests.simulator.world import simulate

SCHEDULES = 1500
SCHEDULES_FOR_A_BUG = 4000  # each is found long before


def test_run_without_faults_commits_and_finishes() -> None:
    outcome = simulate(calm(seed=1))
    assert not outcome.violation
    assert outcome.finished
    assert outcome.commits == 3


def test_run_without_faults_retires_all_but_the_newest() -> None:
    outcome = simulate(calm(seed=2, nodes=1, processes=1, total_steps=8, every_steps=2), tracing=True)
    assert not outcome.violation
    assert sum("RetireBody" in line and " journal " in line for line in outcome.lines) == 2


@pytest.mark.parametrize("first", range(0, SCHEDULES, 500))
def test_schedules_with_faults_break_no_promise(first: int) -> None:
    tally = run_batch(first, 500)
    assert tally.violations == []
    assert tally.commits > 500
    assert tally.finished > 100
    assert len(tally.reached) >= 30


@pytest.mark.parametrize("bug", bugs.BUGS)
def test_planted_bug_is_found(bug: str) -> None:
    tally = run_batch(0, SCHEDULES_FOR_A_BUG, bug, stop_at_first=True)
    assert len(tally.violations) == 1, f"{bug} was not found in {tally.schedules} schedules"
    assert tally.violations[0][1].startswith("Violation")


def test_planted_bug_is_gone_afterwards() -> None:
    assert run_batch(0, 50, "commit-before-the-last-prepare", stop_at_first=True).violations
    assert run_batch(0, 50).violations == []


@pytest.mark.parametrize("seed", [3, 17, 162])
def test_same_seed_gives_the_same_trace(seed: int) -> None:
    first, second = trace(seed, ""), trace(seed, "")
    assert first.lines == second.lines
    assert first.trace_sha256 == second.trace_sha256
    assert first.events > 50


def test_same_seed_gives_the_same_trace_in_another_process() -> None:
    here = [trace(seed, "").trace_sha256 for seed in range(40, 50)]
    program = "from tests.simulator.batch import trace\nfor s in range(40, 50): print(trace(s, '').trace_sha256)"
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        )
        assert there.stdout.split() == here


def test_tracing_changes_nothing() -> None:
    for seed in range(20):
        quiet, loud = simulate(draw(seed)), simulate(draw(seed), tracing=True)
        assert (quiet.events, quiet.commits, quiet.seconds) == (loud.events, loud.commits, loud.seconds)


def test_other_seeds_give_other_schedules() -> None:
    assert len({trace(seed, "").trace_sha256 for seed in range(20)}) == 20
