"""Agents that are killed, and with them their workers: a new one with the same run directory goes on."""

from __future__ import annotations

import signal
import sys

import pytest

from tests.launching.harness import Cluster, Launcher, free_port, wait_for
from tests.recovery import hurt_launcher
from tests.recovery.account import STEPS, Job, arguments
from tests.recovery.conftest import Reference


def test_agent_killed_at_any_place_of_its_saving_is_continued_by_another(cluster: Cluster, unhurt: Reference) -> None:
    job = Job(cluster.path / "job")
    flags = ("--nproc-per-node", 2, "--checkpoint-every", 3, *arguments(job, "ddp", STEPS))
    command = [sys.executable, hurt_launcher.__file__, "launch", *map(str, flags)]
    for number, place in enumerate(hurt_launcher.PLACES, 1):
        before = job.commits()
        step = {hurt_launcher.PLACE: place, hurt_launcher.STEP: str(3 * number)}
        launcher = cluster.start(command, step)
        assert launcher.wait() == -signal.SIGKILL, launcher.text
        assert cluster.nothing_left()
        # The record is the commit, and nothing else is.
        assert (max(job.commits(), default=0) >= 3 * number) == (place == "after the record"), (place, before)
    newest = max(job.commits())
    launcher = cluster.launch(*flags)
    assert launcher.wait() == 0, launcher.text
    assert f"from step {newest}" in launcher.text
    assert job.history() == unhurt("ddp").history()
    assert job.end() == unhurt("ddp").end()
    assert len(job.checkpoints()) == 2  # what the dead ones left half written is gone


@pytest.mark.parametrize("parallel", ["ddp"])
def test_killed_nodes_are_replaced_the_coordinators_too(cluster: Cluster, unhurt: Reference, parallel: str) -> None:
    job = Job(cluster.path / "job")
    secret, port = cluster.path / "secret.pem", free_port()
    assert cluster.start([sys.executable, "-m", "ftrain.cli.main", "secret", str(secret)]).wait() == 0

    def start(rank: int) -> Launcher:
        flags = ("--nnodes", 2, "--node-rank", rank, "--rdzv-endpoint", f"127.0.0.1:{port}", "--secret", secret)
        return cluster.launch(*flags, "--checkpoint-every", 3, *arguments(job, parallel, STEPS))

    nodes = [start(0), start(1)]
    for rank, steps in ((1, 4), (0, 12)):
        wait_for(lambda steps=steps: job.done() >= steps or nodes[0].process.poll() is not None, f"{steps} steps")
        nodes[rank].process.kill()
        nodes[rank].wait()
        nodes[rank] = start(rank)
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text + nodes[1].text
    assert job.history() == unhurt(parallel).history()
    assert job.end() == unhurt(parallel).end()
