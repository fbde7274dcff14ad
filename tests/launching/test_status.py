"""`ftrain status` of runs whose coordinator is gone."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from pathlib import Path

from ftrain.errors import ExitCode
from tests.launching.harness import FTRAIN, Cluster, wait_for

TRAIN = """
    import sys, time, torch, ftrain
    run = ftrain.join()
    model = torch.nn.Linear(2, 1)
    run.track(model=model)
    for step in run.steps(int(sys.argv[1])):
        with step:
            time.sleep(0.05)
"""


def status(run_dir: Path, *flags: str) -> tuple[int, str]:
    done = subprocess.run([*FTRAIN, "status", run_dir, *flags], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_of_a_run_that_has_ended_it_tells_how(cluster: Cluster) -> None:
    run_dir = cluster.path / "run"
    launcher = cluster.launch("--run-dir", run_dir, "--checkpoint-every", 2, cluster.script(TRAIN), 4)
    assert launcher.wait() == 0, launcher.text
    code, text = status(run_dir)
    assert code == 0 and "finished after step 4 (exit code 0)" in text and "commit of step 4" in text, text
    picture = json.loads(status(run_dir, "--json")[1])
    assert (picture["phase"], picture["step"], picture["exit_code"]) == ("over", 4, 0)
    assert [commit["step"] for commit in picture["commits"]][-1] == 4

    # Another run's coordinator, or anything else, may be at its port by now.
    found = json.loads((run_dir / "coordinator.json").read_text())
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stranger.settimeout(60)
        (run_dir / "coordinator.json").write_text(json.dumps({**found, "port": stranger.getsockname()[1]}))
        answering = threading.Thread(target=lambda: stranger.accept()[0].sendall(b"220 smtp\r\n"))
        answering.start()
        code, text = status(run_dir)
        answering.join()
    assert code == 0 and "finished after step 4" in text, text


def test_of_a_run_that_was_killed_it_tells_from_where_it_would_go_on(cluster: Cluster) -> None:
    run_dir = cluster.path / "run"
    launcher = cluster.launch("--run-dir", run_dir, "--checkpoint-every", 2, cluster.script(TRAIN), 10_000)
    launcher.says("checkpoint of step 2 committed")
    launcher.process.kill()
    launcher.wait()
    wait_for(cluster.nothing_left, "its processes are gone")
    code, text = status(run_dir)
    assert code == ExitCode.UNAVAILABLE, text
    assert "nobody listens at that address. The run has not come to its end: its newest commit is of step" in text
