"""Whole nodes that are lost: what their ranks go on from is in another node's memory, and storage is not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ftrain.agent import proc
from ftrain.control.client import fetch_status
from ftrain.control.secret import Secret
from ftrain.errors import Unavailable
from tests.launching.harness import FTRAIN, Cluster, Launcher, free_port, wait_for
from tests.recovery.account import committed

STEPS, HELD_STEP = 20, 14
LOOPBACK = "0100007F"  # as the kernel writes it
TRAINING = """
    import hashlib, json, os, random, sys, time
    from pathlib import Path
    import torch
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel
    import ftrain

    out, parallel, place = Path(sys.argv[1]), *sys.argv[2:4]
    steps, held_rank, held_step = map(int, sys.argv[4:])
    run = ftrain.join()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.2), nn.GELU(), nn.Linear(64, 4))
    model = fully_shard(model) if parallel == "fsdp" else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(2 + run.rank)
    random.seed(2 + run.rank)
    run.track(model=model, optimizer=optimizer)

    def digest():
        found = hashlib.sha256()
        for parameter in model.parameters():
            for tensor in (parameter, *optimizer.state[parameter].values()):
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                found.update(whole.detach().contiguous().numpy().tobytes())
        return found.hexdigest() + str(random.random()) + str(torch.rand(2).tolist())

    def hold(number, here):
        while (number, run.rank, here) == (held_step, held_rank, place) and not (out / "went on").exists():
            time.sleep(0.01)

    out.mkdir(exist_ok=True)
    for step in run.steps(steps):
        with step:
            hold(step.number, "before")
            loss = model(torch.randn(8, 16) + random.random()).square().mean()
            loss.backward()
            hold(step.number, "after")
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(0.1)
            with (out / f"r{run.rank}.jsonl").open("a") as file:
                file.write(json.dumps({"step": step.number, "pid": os.getpid()}) + "\\n")
    (out / f"end-r{run.rank}").write_text(digest())
"""


@dataclass
class Run:
    """A run of two nodes of one rank each. One rank stands still in HELD_STEP, before its collectives or after them."""

    cluster: Cluster
    parallel: str
    held_rank: int
    flags: tuple[object, ...] = ()
    place: str = "before"

    def __post_init__(self) -> None:
        self.path = self.cluster.path / "job"
        self.secret = self.cluster.path / "secret.pem"
        self.port = free_port()
        self.script = self.cluster.script(TRAINING)
        assert self.cluster.start([*FTRAIN, "secret", str(self.secret)]).wait() == 0

    def start(self, node_rank: int = -1) -> Launcher:
        place = () if node_rank < 0 else ("--node-rank", node_rank)
        where = ("--nnodes", 2, *place, "--rdzv-endpoint", f"127.0.0.1:{self.port}", "--secret", self.secret)
        how = ("--checkpoint-every", "off", "--snapshot-every", 3, "--run-dir", self.path, *self.flags)
        return self.cluster.launch(*where, *how, self.script, *self.arguments(self.held_rank))

    def arguments(self, held_rank: int) -> tuple[object, ...]:
        return self.cluster.path / f"out{held_rank}", self.parallel, self.place, STEPS, held_rank, HELD_STEP

    @property
    def out(self) -> Path:
        return self.cluster.path / f"out{self.held_rank}"

    def reference(self) -> list[str]:
        """What the ranks have at the end of the run that nothing happened to."""
        launcher = self.cluster.launch(
            "--nproc-per-node", 2, "--checkpoint-every", "off", self.script, *self.arguments(-1)
        )
        assert launcher.wait() == 0, launcher.text
        return [(self.cluster.path / "out-1" / f"end-r{rank}").read_text() for rank in (0, 1)]

    def end(self) -> list[str]:
        return [(self.out / f"end-r{rank}").read_text() for rank in (0, 1)]

    def pids(self, rank: int) -> list[int]:
        """Of the processes that did the rank's steps, in order."""
        lines = [json.loads(line) for line in (self.out / f"r{rank}.jsonl").read_text().splitlines()]
        return list(dict.fromkeys(line["pid"] for line in lines))

    def kept(self, rank: int) -> dict[str, Any]:
        """What some node keeps of the rank, as the coordinator knows it."""
        try:
            status = asyncio.run(fetch_status(f"127.0.0.1:{self.port}", Secret.load(self.secret)))
        except Unavailable:
            return {}
        return next((node["keeps"][str(rank)] for node in status["nodes"] if str(rank) in node["keeps"]), {})

    def recoveries(self) -> list[dict[str, Any]]:
        return self.events("continues")

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.path / "events.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [event for event in events if event["event"] == kind]


def kill_tree(launcher: Launcher) -> None:
    """The machine is gone: nothing of it says a last word."""
    pids = (launcher.process.pid, *proc.descendants(launcher.process.pid))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    launcher.process.wait()


def flip_a_byte(pid: int, name: str) -> int:
    """In the middle of each of the process's memory files of that name. Returns how many there are."""
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if name in str(link.readlink()):
                fd = os.open(link, os.O_RDWR)
                at = os.fstat(fd).st_size // 2
                os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 1]), at)
                os.close(fd)
                found += 1
    return found


def listens_at(launcher: Launcher) -> list[str]:
    """The addresses at which the agent itself, none of its children, accepts IPv4 or IPv6 connections."""
    links = [str(path.readlink()) for path in Path(f"/proc/{launcher.process.pid}/fd").iterdir()]
    sockets = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{launcher.process.pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in sockets:
                found.append(columns[1].partition(":")[0])
    return found


def stands_still(run: Run, rank: int) -> None:
    """Wait until all that the rank's node has of it is kept elsewhere, and nothing new comes.

    Of a snapshot of replicas each node has all: it is not sent, once that is known.
    """

    def is_kept() -> bool:
        kept = run.kept(rank)
        return HELD_STEP in kept.get("boundaries", ()) and (run.parallel == "ddp" or bool(kept["snapshots"]))

    wait_for(is_kept, "copies of all that the node has")
    assert not list(run.path.glob("checkpoints/*/*"))  # storage has nothing that one could go on from


@pytest.mark.parametrize(("parallel", "tier"), [("ddp", "live"), ("fsdp", "arena")])
def test_lost_node_is_replaced_by_a_spare_from_its_neighbours_memory(
    cluster: Cluster, parallel: str, tier: str
) -> None:
    run = Run(cluster, parallel, held_rank=1)
    nodes = [run.start(0), run.start(1)]
    wait_for(lambda: (run.out / "r1.jsonl").exists(), "steps")
    nodes.append(run.start())
    stands_still(run, 1)
    assert listens_at(nodes[1]) == [LOOPBACK]
    kill_tree(nodes[1])
    (run.out / "went on").touch()
    assert [nodes[0].wait(), nodes[2].wait()] == [0, 0], nodes[0].text + nodes[2].text
    (found,) = run.recoveries()
    assert (found["tier"], found["survivors"], found["forked"]) == (tier, 1, 1)
    assert found["resumes_at"] == HELD_STEP if parallel == "ddp" else 0 < found["resumes_at"] <= HELD_STEP
    assert len(run.pids(0)) == 1
    assert len(run.pids(1)) == 2
    assert run.end() == run.reference()


def test_lost_node_and_lost_rank_go_on_from_the_newest_snapshot_that_there_is(cluster: Cluster) -> None:
    """By default there is one after each step; the one that other nodes have stays beside it."""
    run = Run(cluster, "fsdp", held_rank=1, flags=("--snapshot-every", "auto"))
    nodes = [run.start(0), run.start(1)]
    wait_for(lambda: (run.out / "r1.jsonl").exists(), "steps")
    nodes.append(run.start())
    stands_still(run, 1)
    os.kill(run.pids(1)[0], signal.SIGKILL)
    wait_for(lambda: len(run.recoveries()) == 1, "the first recovery")
    wait_for(lambda: len(run.events("resumed")) == 1, "all ranks in their loop")
    stands_still(run, 1)
    kill_tree(nodes[1])
    (run.out / "went on").touch()
    assert [nodes[0].wait(), nodes[2].wait()] == [0, 0], nodes[0].text + nodes[2].text
    rank, node = run.recoveries()
    assert (rank["tier"], node["tier"]) == ("arena", "arena")
    assert all(0 < one["resumes_at"] <= HELD_STEP for one in (rank, node))
    assert len(run.pids(0)) == 1
    assert run.end() == run.reference()


def test_copy_that_was_damaged_ends_the_rank_that_waits_for_it_and_storage_serves(cluster: Cluster) -> None:
    run = Run(cluster, "fsdp", held_rank=1, flags=("--checkpoint-every", 5))
    nodes = [run.start(0), run.start(1)]
    wait_for(lambda: (run.out / "r1.jsonl").exists(), "steps")
    nodes.append(run.start())
    committed(nodes[0], 5)
    looks: list[dict[str, Any]] = []

    def nothing_comes() -> bool:
        looks.append(run.kept(1))
        there = HELD_STEP in looks[-1].get("boundaries", ()) and looks[-1]["snapshots"]
        return bool(there) and looks[-20:] == looks[-1:] * 20

    wait_for(nothing_comes, "copies of all that the node has")
    assert flip_a_byte(nodes[0].process.pid, "ftrain-peer-1")
    kill_tree(nodes[1])
    (run.out / "went on").touch()
    assert [nodes[0].wait(), nodes[2].wait()] == [0, 0], nodes[0].text + nodes[2].text
    *memory, storage = [one["tier"] for one in run.recoveries()]
    assert set(memory) == {"arena"}  # one for each copy that there was
    assert storage == "storage"
    assert "damaged" in nodes[0].text
    assert "damaged" in nodes[2].text
    assert len(run.pids(0)) == 1
    assert run.end() == run.reference()


def test_lost_node_of_the_coordinator_is_replaced_from_its_neighbours_memory(cluster: Cluster) -> None:
    run = Run(cluster, "ddp", held_rank=0)
    nodes = [run.start(0), run.start(1)]
    stands_still(run, 0)
    kill_tree(nodes[0])
    (run.out / "went on").touch()
    nodes[0] = run.start(0)
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text + nodes[1].text
    (found,) = run.recoveries()
    assert (found["tier"], found["resumes_at"], found["survivors"], found["forked"]) == ("live", HELD_STEP, 1, 1)
    assert len(run.pids(1)) == 1
    assert run.end() == run.reference()


def test_rank_that_does_not_notice_that_its_peers_node_is_gone_does_not_wait_for_the_lease(cluster: Cluster) -> None:
    """As one whose peer died in the middle of a message."""
    run = Run(cluster, "ddp", held_rank=0, flags=("--lease", "10m"), place="after")
    nodes = [run.start(0), run.start(1)]
    wait_for(lambda: (run.out / "r1.jsonl").exists(), "steps")
    nodes.append(run.start())
    wait_for(lambda: f'"step": {HELD_STEP}' in (run.out / "r1.jsonl").read_text(), "the step that rank 0 stays in")
    kill_tree(nodes[1])
    wait_for(lambda: bool(run.recoveries()), "the recovery")
    (run.out / "went on").touch()
    assert [nodes[0].wait(), nodes[2].wait()] == [0, 0], nodes[0].text + nodes[2].text
    (interrupted,) = run.events("interruption")
    assert interrupted["summary"] == "node 1 was lost: its agent's channel closed"
    assert run.end() == run.reference()


def test_nodes_without_peer_copies_listen_nowhere_and_keep_nothing(cluster: Cluster) -> None:
    run = Run(cluster, "ddp", held_rank=1, flags=("--peer-copies", "off"))
    nodes = [run.start(0), run.start(1)]
    wait_for(lambda: (run.out / "r1.jsonl").exists(), "steps")
    assert listens_at(nodes[0]) == [LOOPBACK]  # the coordinator
    assert listens_at(nodes[1]) == []
    assert run.kept(0) == run.kept(1) == {}
    (run.out / "went on").touch()
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text + nodes[1].text
