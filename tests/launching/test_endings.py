"""However a launcher ends, nothing of it is left: not its workers, not what they started, however detached."""

from __future__ import annotations

import os
import signal

import pytest

from ftrain.errors import ExitCode
from tests.launching.harness import Cluster, Launcher, wait_for

# A worker with a child, a child in a session of its own, and a daemon that was orphaned on purpose.
FAMILY = """
    import os, subprocess, sys, time
    subprocess.Popen(["sleep", "600"])
    subprocess.Popen(["sleep", "601"], start_new_session=True)
    subprocess.run(["sh", "-c", "setsid sleep 602 >/dev/null 2>&1 &"])
    print("family is up", os.getpid())
    time.sleep(600)
"""


def start_family(cluster: Cluster, *flags: object) -> Launcher:
    launcher = cluster.launch(*flags, "--nproc-per-node", 2, cluster.script(FAMILY))
    launcher.says("[rank0]: family is up")
    launcher.says("[rank1]: family is up")
    wait_for(lambda: sum("sleep 60" in command for command in cluster.processes().values()) == 6, "their children")
    return launcher


def pids(cluster: Cluster, mark: str) -> list[int]:
    return [pid for pid, command in cluster.processes().items() if mark in command]


def test_ctrl_c_ends_everything_with_130(cluster: Cluster) -> None:
    launcher = start_family(cluster)
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.wait() == ExitCode.INTERRUPTED
    assert cluster.nothing_left()


def test_sigterm_to_a_script_that_never_joined_ends_with_76(cluster: Cluster) -> None:
    launcher = start_family(cluster)
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait() == ExitCode.PREEMPTED_UNSAVED
    assert cluster.nothing_left()


def test_sigterm_while_the_command_itself_is_imported_ends_with_75(cluster: Cluster) -> None:
    cluster.script("import time; print('importing', flush=True); time.sleep(600)", "typer.py")
    launcher = cluster.launch(cluster.script("print('never')"), environment={"PYTHONPATH": str(cluster.path)})
    launcher.says("importing")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait() == ExitCode.PREEMPTED, launcher.text
    assert "left on SIGTERM before anything was started" in launcher.text
    assert "Traceback" not in launcher.text
    assert cluster.nothing_left()


def test_second_signal_does_not_wait_for_a_script_that_ignores_the_first(cluster: Cluster) -> None:
    script = cluster.script("import signal, time; signal.signal(15, 1); print('deaf'); time.sleep(600)")
    launcher = cluster.launch(script)
    launcher.says("deaf")
    launcher.process.send_signal(signal.SIGTERM)
    launcher.says("once more to stop at once")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.wait() == ExitCode.PREEMPTED_UNSAVED
    assert cluster.nothing_left()


def test_killed_agent_takes_everything_along(cluster: Cluster) -> None:
    launcher = start_family(cluster)
    launcher.process.kill()
    assert launcher.wait() == -signal.SIGKILL
    assert cluster.nothing_left()


def test_killed_worker_takes_its_children_along_and_is_started_again(cluster: Cluster) -> None:
    launcher = start_family(cluster)
    os.kill(int(launcher.text.split("family is up ")[1].split()[0]), signal.SIGKILL)
    launcher.says("was killed by SIGKILL")
    wait_for(lambda: launcher.text.count("family is up") == 4, "the next generation")
    wait_for(lambda: sum("sleep 60" in command for command in cluster.processes().values()) == 6, "no old children")
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.wait() == ExitCode.INTERRUPTED
    assert cluster.nothing_left()


def test_killed_nursery_is_replaced_and_leaves_nothing(cluster: Cluster) -> None:
    launcher = start_family(cluster)
    os.kill(min(pids(cluster, "agent.nursery")), signal.SIGKILL)
    launcher.says("starting another")
    wait_for(lambda: launcher.text.count("family is up") == 4, "the next generation")
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.wait() == ExitCode.INTERRUPTED
    assert cluster.nothing_left()


def test_agent_killed_while_its_nursery_still_imports_leaves_nothing(cluster: Cluster) -> None:
    launcher = cluster.launch(cluster.script("print('never')"))
    wait_for(lambda: pids(cluster, "agent.nursery"), "the nursery")
    launcher.process.kill()
    launcher.wait()
    assert cluster.nothing_left()


@pytest.mark.parametrize("code", [0, 1])
def test_normal_end_leaves_nothing(cluster: Cluster, code: int) -> None:
    source = FAMILY.replace("time.sleep(600)", f"time.sleep(0.2); sys.exit({code})")
    launcher = cluster.launch("--max-restarts", 0, "--nproc-per-node", 2, cluster.script(source))
    assert launcher.wait() == code, launcher.text
    assert cluster.nothing_left()
