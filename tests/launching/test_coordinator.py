"""The coordinator by itself: it may die and come back while the training goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ftrain.errors import ExitCode
from tests.launching.harness import FTRAIN, Cluster, Launcher, free_port, wait_for

# Half its steps are left for what a test does, however long it takes.
TRAIN = """
    import time, torch, ftrain
    from pathlib import Path
    run = ftrain.join()
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.track(model=model, optimizer=optimizer)
    print("pid", __import__("os").getpid())
    for step in run.steps(120):
        with step, run.allow(600):
            while step.number == 60 and not Path("go on").exists():
                time.sleep(0.01)
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(0.05)
    print("done")
"""


def start(cluster: Cluster) -> tuple[list[str], tuple[object, ...]]:
    """The command of the coordinator, and the flags that its nodes share."""
    secret, run_dir, endpoint = cluster.path / "secret.pem", cluster.path / "run", f"127.0.0.1:{free_port()}"
    subprocess.run([*FTRAIN, "secret", str(secret)], check=True, capture_output=True)
    shared = ["--rdzv-endpoint", endpoint, "--nnodes", "2", "--secret", str(secret), "--run-dir", str(run_dir)]
    coordinator = [sys.executable, "-m", "ftrain.cli.main", "coordinator", *shared, "--checkpoint-every", "10"]
    return coordinator, tuple(shared)


def status(cluster: Cluster) -> dict[str, Any]:
    command = [*FTRAIN, "status", str(cluster.path / "run"), "--secret", str(cluster.path / "secret.pem"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {"step": -1, "commits": []}


def go_on(cluster: Cluster) -> None:
    """Let the training come to its end."""
    (cluster.path / "go on").touch()


def commits(run_dir: Path) -> int:
    return sum(b'"kind":"commit"' in path.read_bytes() for path in (run_dir / "journal").glob("*.json"))


def test_killed_coordinator_comes_back_and_adopts_the_running_generation(cluster: Cluster) -> None:
    command, flags = start(cluster)
    first = cluster.start(command)
    first.says("serving run")
    nodes: list[Launcher] = [cluster.launch(*flags, "--node-rank", rank, cluster.script(TRAIN)) for rank in (0, 1)]
    wait_for(lambda: status(cluster)["commits"], "the first commit")
    first.process.kill()
    first.wait()
    nodes[0].says("the coordinator cannot be reached")
    before = commits(cluster.path / "run")
    second = cluster.start(command)
    second.says("still running on all nodes: carrying on with it")
    go_on(cluster)
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text + nodes[1].text
    assert second.wait() == ExitCode.OK
    assert commits(cluster.path / "run") > before
    assert "generation 2" not in second.text
    assert all(node.text.count("pid") == 1 for node in nodes), "a worker was started twice"


def test_stranger_in_the_place_of_a_coordinator_that_died_does_not_end_the_training(cluster: Cluster) -> None:
    command, flags = start(cluster)
    first = cluster.start(command)
    first.says("serving run")
    nodes = [cluster.launch(*flags, "--node-rank", rank, cluster.script(TRAIN)) for rank in (0, 1)]
    wait_for(lambda: status(cluster)["commits"], "the first commit")
    first.process.kill()
    first.wait()
    secret = cluster.path / "other.pem"
    subprocess.run([*FTRAIN, "secret", str(secret)], check=True, capture_output=True)
    others = {str(cluster.path / "secret.pem"): str(secret), str(cluster.path / "run"): str(cluster.path / "other")}
    stranger = cluster.start([others.get(word, word) for word in command])
    for node in nodes:
        node.says("waiting for the coordinator: ")
        node.says("does not hold this run's secret")
    stranger.process.kill()
    stranger.wait()
    second = cluster.start(command)
    go_on(cluster)
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text + nodes[1].text
    assert second.wait() == ExitCode.OK


def test_stopped_coordinator_ends_with_75_and_leaves_the_training_alone(cluster: Cluster) -> None:
    command, flags = start(cluster)
    first = cluster.start(command)
    first.says("serving run")
    nodes = [cluster.launch(*flags, "--node-rank", rank, cluster.script(TRAIN)) for rank in (0, 1)]
    wait_for(lambda: status(cluster)["commits"], "the first commit")
    first.process.terminate()
    assert first.wait() == ExitCode.PREEMPTED
    second = cluster.start(command)
    go_on(cluster)
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text + nodes[1].text
    assert second.wait() == ExitCode.OK
