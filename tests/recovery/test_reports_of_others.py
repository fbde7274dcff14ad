"""The worst of what users report of other tools, done to ftrain with real processes.

Some of it is shown by tests elsewhere:

- a restart loop on a corrupt checkpoint (llnl/scr#174, bghira/SimpleTuner#2613): `test_continuing`, the newest commit
  damaged, and all of them
- half a checkpoint taken for the newest one (facebookresearch/metaseq#53): `test_killed_agents`, killed at any place of
  its saving
- an abort that hangs (NVIDIA/nccl#1013, #1777): `worker/test_worker_groups_meeting`, a connection that nobody answers;
  and below, a rank that does not come to a halt
- a hung rank that is waited for until its collective's timeout (pytorch/elastic#134): `test_hangs`
- a job that is lost with the node of its rendezvous (dlrover#450): `test_lost_nodes`, `test_killed_agents`
- fewer nodes than the minimum that wait for ever (dlrover#1534): `launching/test_wrong_uses`, too few nodes in time
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ftrain.agent import proc
from ftrain.errors import ExitCode
from tests.launching.harness import FTRAIN, Cluster, Launcher, free_port, wait_for
from tests.recovery.account import STEPS, Job, arguments, launch
from tests.recovery.conftest import Reference
from tests.recovery.training import INJURIES

LONG = 5000  # steps: more than a test waits for


class Nodes:
    """Launchers of one run on several nodes, each of one rank."""

    def __init__(self, cluster: Cluster, nnodes: object, steps: int, *flags: object) -> None:
        self.job = Job(cluster.path / "job")
        self._cluster = cluster
        self._steps = steps
        secret = cluster.path / "secret.pem"
        assert cluster.start([*FTRAIN, "secret", str(secret)]).wait() == 0
        where = ("--nnodes", nnodes, "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--secret", secret)
        self._flags = (*where, "--rdzv-conf", "last_call_timeout=5", "--lease", "5s", *flags)

    def start(self, node_rank: int = -1) -> Launcher:
        place = () if node_rank < 0 else ("--node-rank", node_rank)
        script = arguments(self.job, "ddp", self._steps, "--norm", "layer")
        return self._cluster.launch(*self._flags, *place, *script)

    def worlds(self) -> list[int]:
        return [body["world_size"] for body in self.job.journal("generation")]

    def wait_world(self, size: int, *launchers: Launcher) -> None:
        """Until the newest generation has so many ranks, and the last of them has done a step in it."""

        def there() -> bool:
            told = "\n".join(launcher.text for launcher in launchers)
            assert all(launcher.process.poll() is None for launcher in launchers), told
            newest = self.job.journal("generation")[-1:]
            return newest != [] and newest[0]["world_size"] == size and self._has_stepped(newest[0], size - 1)

        wait_for(there, f"a step of {size} ranks")

    def _has_stepped(self, generation: dict[str, object], rank: int) -> bool:
        return any(one.rank == rank and one.generation == generation["generation"] for one in self.job.steps())


def tree(launcher: Launcher) -> list[int]:
    return [launcher.process.pid, *proc.descendants(launcher.process.pid)]


def events(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.run_dir / "events.jsonl").read_text().splitlines()]


def shared_memory(pids: Iterable[int]) -> set[str]:
    """What these processes may write and have in common, by its names, or those that it was made with."""
    names = set()
    for pid in pids:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            _, flags, *_, name = [*line.split(maxsplit=5), ""][:6]
            if flags.startswith("rw") and flags.endswith("s"):
                names.add(name.strip())
    return names


def test_run_killed_with_everything_leaves_no_segment_and_the_next_one_finds_none(
    cluster: Cluster, unhurt: Reference
) -> None:
    """DLRover keeps snapshots in named segments: stale or locked ones met the next start (dlrover#856, #1466)."""
    job = Job(cluster.path / "job")
    launcher = launch(cluster, job)
    wait_for(lambda: job.commits(), "a commit")
    pids = tree(launcher)
    # There is some, and none of it has a name: it is gone with the last process that has it.
    names = shared_memory(pids)
    assert "/memfd:ftrain-arena-0 (deleted)" in names
    assert not [name for name in names if Path(name).exists()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # nobody gets to tidy up
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    launcher.wait()
    assert cluster.nothing_left()
    launcher = launch(cluster, job)
    assert launcher.wait() == 0, launcher.text
    assert job.end() == unhurt("ddp").end()


def test_node_that_left_and_comes_back_is_taken_in_again(cluster: Cluster) -> None:
    """torchrun's agent closes the rendezvous when it ends: all others end with RendezvousClosedError, and who is
    started again does too (pytorch#147064, #91943, kubeflow/trainer#1638)."""
    nodes = Nodes(cluster, "1:2", LONG, "--checkpoint-every", 20)
    first, second = nodes.start(0), nodes.start(1)
    nodes.wait_world(2, first, second)
    second.process.send_signal(signal.SIGTERM)
    assert second.wait() == ExitCode.PREEMPTED, second.text
    nodes.wait_world(1, first)
    second = nodes.start(1)
    nodes.wait_world(2, first, second)
    for launcher in (first, second):
        launcher.process.send_signal(signal.SIGTERM)
    assert [first.wait(), second.wait()] == [ExitCode.PREEMPTED] * 2, first.text + second.text
    assert nodes.worlds()[-3:] == [2, 1, 2]  # on a busy machine the second may come after the last call
    assert cluster.nothing_left()


def test_node_that_falls_silent_is_lost_after_its_lease_and_taken_in_when_it_wakes(cluster: Cluster) -> None:
    """torchrun's missed keep-alives take a node out of a list, and nobody starts anything again (pytorch#111646)."""
    nodes = Nodes(cluster, "1:2", LONG, "--checkpoint-every", 20)
    first, second = nodes.start(0), nodes.start(1)
    nodes.wait_world(2, first, second)
    pids = tree(second)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # as a machine that swaps itself to death: its connections stay open
    nodes.wait_world(1, first)
    assert "its lease ran out" in first.text
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    nodes.wait_world(2, first, second)
    for launcher in (first, second):
        launcher.process.send_signal(signal.SIGTERM)
    assert [first.wait(), second.wait()] == [ExitCode.PREEMPTED] * 2, first.text + second.text
    # What the one that was asleep had begun when it woke did not count.
    history = nodes.job.history()
    assert sorted({step for step, _ in history}) == list(range(nodes.job.done()))
    assert nodes.job.commits() == sorted(set(nodes.job.commits()))
    assert cluster.nothing_left()


def test_survivor_that_does_not_come_to_a_halt_is_killed_too_and_the_others_keep_their_processes(
    cluster: Cluster,
) -> None:
    """Survivors hang in the abort of their communicators, and nothing starts again before a timeout of half an hour
    (NVIDIA/nccl#1013)."""
    job = Job(cluster.path / "job")
    injuries = [
        {"point": "step", "rank": 0, "step": 8, "how": "rest"},  # longer than it is waited for
        {"point": "after the optimizer", "rank": 1, "step": 8, "how": "SIGKILL"},
    ]
    more = ("--norm", "layer")
    launcher = launch(cluster, job, ranks=3, more=more, environment={INJURIES: json.dumps(injuries)})
    assert launcher.wait() == 0, launcher.text
    [found] = [event for event in events(job) if event["event"] == "continues"]
    assert (found["survivors"], found["forked"]) == (1, 2)
    pids = {rank: {step.pid for step in job.steps() if step.rank == rank} for rank in range(3)}
    assert [len(pids[rank]) for rank in range(3)] == [2, 2, 1]
    assert sorted({step for step, _ in job.history()}) == list(range(STEPS))


def test_more_launchers_than_nodes_wait_and_end_with_the_run(cluster: Cluster) -> None:
    """In torchrun and DLRover surplus agents made new rounds, or waited until they failed (pytorch#114097,
    dlrover#1534)."""
    nodes = Nodes(cluster, 2, 60, "--checkpoint-every", 20)
    launchers = [nodes.start() for _ in range(3)]
    assert [launcher.wait() for launcher in launchers] == [0] * 3, "\n".join(one.text for one in launchers)
    assert nodes.worlds() == [2]
    assert sorted({step for step, _ in nodes.job.history()}) == list(range(60))
    assert cluster.nothing_left()


LOADING = """
    import sys, time
    from pathlib import Path
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
    import ftrain

    out, steps = Path(sys.argv[1]), int(sys.argv[2])
    run = ftrain.join()
    torch.manual_seed(1)
    model = DistributedDataParallel(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.arange(960.0))
    loader = DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=True), num_workers=2)
    batches = run.batches(loader)
    run.track(model=model, optimizer=optimizer)
    out.mkdir(exist_ok=True)
    for step in run.steps(steps):
        with step:
            [numbers] = next(batches)
            model(numbers.reshape(-1, 1).expand(-1, 4) / 960).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(0.05)
            with (out / f"r{run.rank}").open("a") as file:
                file.write(f"{step.number} {numbers.tolist()}\\n")
"""


def test_sigterm_that_ends_the_data_loaders_first_still_saves_the_last_step(cluster: Cluster) -> None:
    """Slurm signals every process of a job: the loading processes die first, their rank of that, and what was to be
    saved in the time of grace is not (KempnerForge#177, allenai/olmoearth_pretrain#604)."""
    script, run_dir, out = cluster.script(LOADING), cluster.path / "run", cluster.path / "out"

    def start(steps: int) -> Launcher:
        flags = ("--nproc-per-node", 2, "--checkpoint-every", "1h", "--run-dir", run_dir)
        return cluster.launch(*flags, script, out, steps)

    launcher = start(LONG)
    wait_for(lambda: len(lines(out)) >= 5 or launcher.process.poll() is not None, "5 steps")
    pids = tree(launcher)
    for pid in reversed(pids):  # children before their parents
        os.kill(pid, signal.SIGTERM)
    assert launcher.wait() == ExitCode.PREEMPTED, launcher.text
    done = len(lines(out))
    [commit] = Job(cluster.path).journal("commit")
    assert commit["attempt"]["step"] == done, launcher.text
    launcher = start(done + 5)
    assert launcher.wait() == 0, launcher.text
    whole = cluster.path / "whole"
    reference = cluster.launch("--nproc-per-node", 2, "--checkpoint-every", "off", script, whole, done + 5)
    assert reference.wait() == 0, reference.text
    assert lines(out) == lines(whole)
    assert cluster.nothing_left()


def lines(out: Path) -> list[str]:
    """What rank 0 did, step by step."""
    path = out / "r0"
    return path.read_text().splitlines() if path.exists() else []
