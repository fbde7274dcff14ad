"""Ranks that die while others live on: only they are started again, and the run ends bit for bit as the unhurt one."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence

import pytest

from tests.launching.harness import Cluster, wait_for
from tests.recovery.account import Job, launch
from tests.recovery.training import INJURIES

LAYER = ("--norm", "layer")  # no buffers: nothing but the random numbers and the data is a rank's own


def killed(point: str, rank: int, step: int) -> dict[str, object]:
    return {"point": point, "rank": rank, "step": step, "how": "SIGKILL"}


def pids(job: Job, rank: int) -> set[int]:
    return {step.pid for step in job.steps() if step.rank == rank}


def compare(
    cluster: Cluster,
    parallel: str,
    injuries: Sequence[dict[str, object]],
    flags: Sequence[object] = (),
    more: Sequence[object] = (),
    every: object = 100,
    ranks: int = 2,
) -> tuple[Job, str]:
    """Run it hurt and unhurt; returns the hurt one and what it told."""
    hurt, unhurt = Job(cluster.path / "hurt"), Job(cluster.path / "unhurt")
    told = json.dumps(injuries)
    first = launch(
        cluster, hurt, parallel, ranks=ranks, every=every, flags=flags, more=more, environment={INJURIES: told}
    )
    assert first.wait() == 0, first.text
    assert hurt.injuries() == len(injuries), first.text
    other = launch(cluster, unhurt, parallel, ranks=ranks, every="off", more=(*more, "--pause", 0))
    assert other.wait() == 0, other.text
    assert hurt.history() == unhurt.history(), first.text
    assert hurt.end() == unhurt.end(), first.text
    assert cluster.nothing_left()
    return hurt, first.text


def test_lost_replica_costs_no_finished_step_and_survivors_keep_their_processes(cluster: Cluster) -> None:
    injuries = [killed("at the boundary", 1, 5), killed("at the boundary", 0, 11), killed("step", 1, 17)]
    job, told = compare(cluster, "ddp", injuries, flags=("--snapshot-every", "off"), more=LAYER)
    assert told.count("from living ranks; 0 finished step(s) to redo") == 3, told
    assert len(pids(job, 0)) == 2
    assert len(pids(job, 1)) == 3
    assert job.commits() == [24]  # nothing was there to be read


def test_successor_of_a_lost_rank_is_a_process_that_was_there_before(cluster: Cluster) -> None:
    job = Job(cluster.path / "job")
    run = launch(cluster, job, every=100, flags=("--snapshot-every", "off"), more=(*LAYER, "--pause", 0.5))
    wait_for(lambda: job.done(1), "a step")
    at_work = 5  # launcher, nursery, store, two ranks
    wait_for(lambda: len(cluster.processes()) == at_work + 2, "a spare for a rank and one for a store")
    there = set(cluster.processes())
    os.kill(max(pids(job, 1)), signal.SIGKILL)
    assert run.wait() == 0, run.text
    assert len(pids(job, 1)) == 2
    assert pids(job, 1) <= there, run.text
    assert "going on in place" in run.text
    assert cluster.nothing_left()


def test_rank_that_dies_before_its_optimizer_is_replayed_where_others_are_ahead(cluster: Cluster) -> None:
    injuries = [killed("step", 1, step) for step in (3, 9)] + [killed("step", 0, 15)]
    _, told = compare(cluster, "ddp", injuries, flags=("--snapshot-every", "off"), more=LAYER)
    assert told.count("going on in place") == 3, told


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_optimizer_that_was_interrupted_is_never_believed(cluster: Cluster, parallel: str) -> None:
    injuries = [killed("after the optimizer", 1, 6), killed("after the optimizer", 0, 13)]
    _, told = compare(cluster, parallel, injuries, flags=("--snapshot-every", 1))
    assert told.count("going on in place") == 2, told


def test_lost_shard_comes_back_from_the_newest_snapshot_in_memory(cluster: Cluster) -> None:
    injuries = [killed("step", 1, 9), killed("step", 0, 16)]
    job, told = compare(cluster, "fsdp", injuries, flags=("--snapshot-every", 1))
    assert told.count("going on in place") == told.count("from snapshots in memory") == 2, told
    assert len(pids(job, 0)) == len(pids(job, 1)) == 2
    assert job.commits() == [24]


def test_snapshots_go_on_while_a_commit_is_written(cluster: Cluster) -> None:
    """The commit of step 10 takes long, and a rank is lost meanwhile: what was finished since is not done again."""
    flags = ("--snapshot-every", "auto", "--persist-rate", "50KB")
    job, told = compare(cluster, "fsdp", [killed("step", 1, 18)], flags=flags, more=("--pause", 0.3), every=10)
    assert told.count("from snapshots in memory") == 1, told
    assert told.index("going on in place") < told.index("checkpoint of step 10 committed"), told
    redone = int(re.findall(r"(\d+) finished step\(s\) to redo", told)[0])
    assert redone <= 4, told
    assert job.commits() == [10, 24]


@pytest.mark.parametrize("victim", [0, 1], ids=["survivor", "newcomer"])
def test_failure_during_a_recovery_is_recovered_from(cluster: Cluster, victim: int) -> None:
    injuries = [killed("at the boundary", 1, 8), killed("on the way", victim, 8)]
    job, told = compare(cluster, "ddp", injuries, flags=("--snapshot-every", "off"), more=LAYER, ranks=3)
    assert told.count("going on in place") == 2, told
    assert len(pids(job, 2)) == 1


@pytest.mark.parametrize("optimizer", ["torch", "own"])
def test_rank_that_replayed_for_a_line_that_is_lost_goes_on_from_an_earlier_one(
    cluster: Cluster, optimizer: str
) -> None:
    """Rank 2 alone finished step 9, and dies when rank 0 has done it again to come level with it."""

    def hurt(point: str, rank: int, step: int, how: str) -> dict[str, object]:
        return {"point": point, "rank": rank, "step": step, "how": how}

    injuries = [
        hurt("step", 0, 9, "receive from rank 1"),
        hurt("forward", 2, 10, "note ahead"),
        hurt("step", 1, 9, "await ahead"),
        hurt("step", 1, 9, "SIGKILL"),
        hurt("on the way", 0, 10, "note replayed"),
        hurt("on the way", 2, 10, "await replayed"),
        hurt("on the way", 2, 10, "SIGKILL"),
    ]
    flags, more = ("--snapshot-every", "off"), (*LAYER, "--optimizer", optimizer)
    _, told = compare(cluster, "ddp", injuries, flags=flags, more=more, ranks=3)
    assert "going on in place from step 10 (from living ranks; 0 finished" in told, told
    # torch's optimizers are passed over in a replay. Another one has written to what rank 0 had of step 9.
    kept = "going on in place from step 9 (from living ranks; 1 finished step(s) to redo)" in told
    assert kept == (optimizer == "torch"), told


def test_run_is_hurt_again_and_again_and_one_process_sees_it_all(cluster: Cluster) -> None:
    injuries = [killed("step", 1, step) for step in range(2, 22, 2)]
    job, told = compare(cluster, "ddp", injuries, flags=("--snapshot-every", 1), more=LAYER)
    assert told.count("going on in place") == len(injuries), told
    assert len(pids(job, 0)) == 1


def test_communication_hook_that_remembers_nothing_is_recovered_in_place(cluster: Cluster) -> None:
    injuries = [killed("at the boundary", 1, 5), killed("forward", 0, 11), killed("step", 1, 17)]
    _, told = compare(cluster, "ddp", injuries, flags=("--snapshot-every", "off"), more=(*LAYER, "--hook", "half"))
    assert told.count("from living ranks; 0 finished step(s) to redo") == 3, told


@pytest.mark.parametrize("more", [("--hook", "own"), ("--told",)], ids=["hook", "object"])
def test_script_whose_ranks_cannot_come_back_alone_is_begun_anew_as_a_whole(
    cluster: Cluster, more: tuple[str, ...]
) -> None:
    """The first rank to see it says so, and that is tried once at most: the run used to give up after the kill."""
    job, told = compare(cluster, "ddp", [killed("at the boundary", 1, 8)], every=3, more=(*LAYER, *more))
    assert told.count("going on in place") <= 1, told  # the living rank may have said so before anything was tried
    assert told.count("starting again from step") == 1, told
    assert len(pids(job, 0)) == 2
