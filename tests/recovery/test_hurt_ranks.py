"""Ranks that die, in any way and at any place: the run ends bit for bit where the unhurt run does."""

from __future__ import annotations

import json

import pytest

from tests.launching.harness import Cluster
from tests.recovery.account import STEPS, Job, launch
from tests.recovery.conftest import Reference
from tests.recovery.training import INJURIES

IN_STEPS = [
    {"point": "step", "rank": 1, "step": 1, "how": "SIGKILL"},  # before the first commit
    {"point": "step", "rank": 1, "step": 7, "how": "SIGKILL"},
    {"point": "step", "rank": 0, "step": 10, "how": "raise"},
    {"point": "step", "rank": 0, "step": 13, "how": "exit"},
    {"point": "step", "rank": 0, "step": 16, "how": "raise"},  # the same again, but commits were made in between
    {"point": "step", "rank": 1, "step": 19, "how": "SIGSEGV"},
]
# Each in a generation of its own: a commit that is under way lets a step pass, and two would meet in the next snapshot.
IN_CHECKPOINTS = [
    {"generation": 1, "point": "before the copy", "rank": 1, "step": 3, "how": "SIGKILL"},
    {"generation": 2, "point": "in the copy", "rank": 0, "step": 6, "how": "SIGKILL"},
    {"generation": 3, "point": "after the copy", "rank": 1, "step": 9, "how": "SIGKILL"},
    {"generation": 4, "point": "before the seal", "rank": 0, "step": 12, "how": "SIGKILL"},
    {"generation": 5, "point": "after all seals", "rank": 1, "step": 15, "how": "SIGKILL"},
]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("injuries", [IN_STEPS, IN_CHECKPOINTS], ids=["in-steps", "in-checkpoints"])
def test_hurt_run_ends_bit_for_bit_as_the_unhurt_one(
    cluster: Cluster, unhurt: Reference, parallel: str, injuries: list[dict[str, object]]
) -> None:
    job = Job(cluster.path / "job")
    slowly = ("--pause", 0.1)  # or the steps are over before there were so many snapshots
    launcher = launch(cluster, job, parallel, more=slowly, environment={INJURIES: json.dumps(injuries)})
    assert launcher.wait() == 0, launcher.text
    assert job.injuries() == len(injuries)
    assert launcher.text.count("interrupted: rank") == len(injuries), launcher.text
    reference = unhurt(parallel)
    assert job.history() == reference.history()
    assert job.end() == reference.end()
    assert job.commits()[-1] == STEPS  # the last state is committed, whatever the period
    assert len(job.checkpoints()) == min(2, len(job.commits()))  # --keep 2
    assert cluster.nothing_left()
    if injuries is IN_CHECKPOINTS:
        # All ranks had sealed: the death of one of them does not lose the step.
        last = job.journal("generation")[-1]["line_step"]
        assert last >= 15
        goes_on = (step.number for step in job.steps() if step.generation == len(injuries) + 1)
        assert min(goes_on, default=STEPS) == last  # a busy machine may have come to the last snapshot by then


def test_same_error_again_without_a_commit_gives_up_with_its_traceback(cluster: Cluster) -> None:
    twice = [{"point": "step", "rank": 1, "step": 7, "how": "raise"}] * 2
    job = Job(cluster.path / "job")
    launcher = launch(cluster, job, every=100, environment={INJURIES: json.dumps(twice)})
    assert launcher.wait() == 1
    lines = launcher.text.splitlines()
    words = "giving up: the same error came back at step 7"
    summary = next(number for number, line in enumerate(lines) if words in line)
    assert lines[summary - 1] == "ValueError: hurt on purpose"
    assert max(step.generation for step in job.steps()) == 2
    assert job.commits() == []
