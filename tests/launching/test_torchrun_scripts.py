"""Scripts that were written for torchrun and never heard of ftrain."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching.harness import Cluster, free_port

ALLREDUCE = """
    import os, sys, torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.ones(1) * (dist.get_rank() + 1)
    dist.all_reduce(total)
    print(f"sum {total.item():.0f} restart {os.environ['TORCHELASTIC_RESTART_COUNT']} args {sys.argv[1:]}")
    if "fail-once" in sys.argv and dist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise ValueError("only the first time")
    dist.barrier()
    if "fail-always" in sys.argv and dist.get_rank() == 1:
        raise ValueError("every time")
    dist.barrier()
    dist.destroy_process_group()
"""
DESTROYED_BEFORE_ITS_MODULE = """
    import os, sys, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    def train(number):
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}-{number}", rank=rank, world_size=size)
        model = DistributedDataParallel(torch.nn.Linear(20, 1))
        for _ in range(2):
            model(torch.randn(8, 20)).sum().backward()
        dist.destroy_process_group()

    for number in range(40):
        train(number)
    print("trained")
"""
ENVIRONMENT = """
    import json, os, sys
    names = [name for name in os.environ if name.startswith(("TORCHELASTIC_", "MASTER_", "OMP_", "TORCH_NCCL"))
             or name.endswith(("RANK", "WORLD_SIZE", "ROLE_NAME"))]
    with open(sys.argv[1] + os.environ["RANK"], "w") as file:
        json.dump({name: os.environ[name] for name in names}, file)
"""


def test_script_without_ftrain_runs_on_two_ranks(cluster: Cluster) -> None:
    launcher = cluster.launch("--nproc-per-node", 2, cluster.script(ALLREDUCE), "--own", "-x", "1")
    assert launcher.wait() == 0, launcher.text
    for rank in (0, 1):
        assert f"[rank{rank}]: sum 3 restart 0 args ['--own', '-x', '1']" in launcher.text


def test_a_group_that_is_destroyed_before_its_module_does_not_hang(cluster: Cluster) -> None:
    script = cluster.script(DESTROYED_BEFORE_ITS_MODULE)
    launcher = cluster.launch("--nproc-per-node", 2, script, cluster.path / "store")
    assert launcher.wait() == 0, launcher.text
    assert launcher.text.count("trained") == 2


def test_two_launchers_on_one_host_are_two_nodes(cluster: Cluster) -> None:
    secret, port = cluster.path / "secret.pem", free_port()
    assert cluster.start([sys.executable, "-m", "ftrain.cli.main", "secret", str(secret)]).wait() == 0
    flags = ("--nnodes", 2, "--nproc_per_node", 2, "--rdzv-endpoint", f"127.0.0.1:{port}", "--secret", secret)
    script = cluster.script(ALLREDUCE)
    nodes = [cluster.launch(*flags, "--node_rank", rank, "--run-dir", cluster.path / "run", script) for rank in (1, 0)]
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text + nodes[1].text
    assert "[rank3]: sum 10" in nodes[0].text
    assert "[rank0]: sum 10" in nodes[1].text


def test_environment_is_what_torchrun_sets(cluster: Cluster) -> None:
    script = cluster.script(ENVIRONMENT)
    theirs, ours = cluster.path / "theirs-", cluster.path / "ours-"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run([*command, str(theirs)], check=True, capture_output=True, timeout=90)
    assert cluster.launch("--standalone", "--nproc-per-node", 2, script, ours).wait() == 0
    # Values that differ from run to run by their nature; whether the restart limit has a default is a choice of ours.
    varying = {
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_ERROR_FILE",
        "TORCHELASTIC_MAX_RESTARTS",
    }
    for rank in "01":
        expected = json.loads(Path(f"{theirs}{rank}").read_text())
        found = json.loads(Path(f"{ours}{rank}").read_text())
        assert set(expected) - set(found) <= {"TORCHELASTIC_SIGNALS_TO_HANDLE"}
        same = {name: value for name, value in expected.items() if name in found and name not in varying}
        assert {name: found[name] for name in same} == same


def test_rank_that_raises_once_restarts_the_group(cluster: Cluster) -> None:
    launcher = cluster.launch("--nproc-per-node", 2, cluster.script(ALLREDUCE), "fail-once")
    assert launcher.wait() == 0, launcher.text
    assert "rank 1 raised ValueError: only the first time" in launcher.text
    assert "sum 3 restart 1" in launcher.text


def test_master_port_is_the_stores_in_every_generation(cluster: Cluster) -> None:
    port = free_port()
    source = ALLREDUCE.replace(
        'init_process_group("gloo")',
        f"""init_process_group(
        "gloo", init_method="tcp://127.0.0.1:{port}", rank=int(os.environ["RANK"]), world_size=2
    )""",
    )
    launcher = cluster.launch("--nproc-per-node", 2, "--master-port", port, cluster.script(source), "fail-once")
    assert launcher.wait() == 0, launcher.text
    assert "[rank0]: sum 3 restart 1" in launcher.text


def test_same_error_twice_gives_up_with_the_traceback_above_the_summary(cluster: Cluster) -> None:
    launcher = cluster.launch("--nproc-per-node", 2, cluster.script(ALLREDUCE), "fail-always")
    assert launcher.wait() == 1
    lines = launcher.text.splitlines()
    summary = next(index for index, line in enumerate(lines) if "giving up: the same error came back" in line)
    assert lines[summary - 1] == "ValueError: every time"
    assert "restart 2" not in launcher.text


def test_max_restarts_is_obeyed_as_torchrun_does(cluster: Cluster) -> None:
    launcher = cluster.launch("--max-restarts", 3, "--nproc-per-node", 1, cluster.script("raise ValueError('no')"))
    assert launcher.wait() == 1
    assert launcher.text.count("interrupted: rank 0 raised ValueError: no") == 3
    assert "3 restarts (--max-restarts) are used up" in launcher.text


def test_module_and_program_run_like_a_script(cluster: Cluster) -> None:
    package = cluster.path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text("import sys; print('module', __name__, sys.argv[1:])")
    module = cluster.launch("-m", "mine.train", "1")
    program = cluster.launch("--no-python", "--nproc-per-node", "2", "sh", "-c", "echo program $RANK")
    assert (module.wait(), program.wait()) == (0, 0), module.text + program.text
    assert "module __main__ ['1']" in module.text
    assert "[rank1]: program 1" in program.text


def test_streams_go_where_the_flags_say(cluster: Cluster) -> None:
    script = cluster.script("import os, sys; print('out', os.environ['RANK']); print('err', file=sys.stderr)")
    logs = cluster.path / "logs"
    flags = ("--nproc-per-node", 2, "--log-dir", logs, "--redirects", "1:1", "--local-ranks-filter", "1")
    launcher = cluster.launch(*flags, script)
    assert launcher.wait() == 0
    assert "[rank1]: err" in launcher.text
    assert "[rank0]" not in launcher.text
    assert "out" not in launcher.text
    for rank in "01":
        assert (logs / "generation-0001" / f"rank-{rank}" / "stdout.log").read_text() == f"out {rank}\n"
        assert (logs / "generation-0001" / f"rank-{rank}" / "stderr.log").read_text() == "err\n"


@pytest.mark.parametrize("ending", ["import sys; sys.exit(3)", "import os; os.kill(os.getpid(), 11)"])
def test_rank_that_ends_badly_is_named(cluster: Cluster, ending: str) -> None:
    launcher = cluster.launch("--max-restarts", 0, cluster.script(ending))
    assert launcher.wait() == 1
    assert ("exited with code 3" if "exit" in ending else "was killed by SIGSEGV") in launcher.text
