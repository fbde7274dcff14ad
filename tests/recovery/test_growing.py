"""Runs of MIN:MAX nodes: they go on smaller when a node is gone, and take one in that joins."""

from __future__ import annotations

import json
import signal
import sys

from tests.launching.harness import Cluster, Launcher, free_port, wait_for
from tests.recovery.account import Job, arguments
from tests.recovery.training import INJURIES

STEPS = 120


def test_node_that_joins_later_is_taken_in_and_a_lost_one_is_done_without(cluster: Cluster) -> None:
    job = Job(cluster.path / "job")
    secret, port = cluster.path / "secret.pem", free_port()
    assert cluster.start([sys.executable, "-m", "ftrain.cli.main", "secret", str(secret)]).wait() == 0

    def start(rank: int) -> Launcher:
        flags = ("--nnodes", "1:2", "--node-rank", rank, "--rdzv-endpoint", f"127.0.0.1:{port}", "--secret", secret)
        conf = ("--rdzv-conf", "last_call_timeout=1")
        run = ("--checkpoint-every", 100, *arguments(job, "ddp", STEPS))
        return cluster.launch(*flags, *conf, *run, environment={INJURIES: json.dumps([held])})

    # However long the second node takes to come, the first has steps left for it.
    held = {"point": "step", "rank": 0, "step": 5, "how": "wait for leave"}
    first = start(0)
    wait_for(lambda: job.done() >= 5 or first.process.poll() is not None, "5 steps")
    second = start(1)
    first.says("joined: going on with it after the next commit")
    (job.path / "leave").touch()
    wait_for(lambda: job.done(rank=1) >= 1 or first.process.poll() is not None, f"a step on two nodes: {first.text}")
    second.process.send_signal(signal.SIGKILL)
    second.wait()
    assert first.wait() == 0, first.text
    worlds = [body["world_size"] for body in job.journal("generation")]
    assert worlds == [1, 2, 1]
    # Not one step was lost when the second node joined: all had stopped where the commit is.
    grown = job.journal("generation")[1]
    assert grown["resumes"]["step"] in job.commits()
    assert sorted({step.number for step in job.steps()}) == list(range(STEPS))
    assert cluster.nothing_left()
