"""What people get wrong: each ends with its exit code and a sentence that says what to do; docs/errors.md has them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftrain.cli.main import main
from ftrain.cli.options import visible_gpus
from ftrain.control.secret import Secret
from ftrain.errors import ExitCode
from tests.launching.harness import Cluster, Launcher, clusters, free_port, wait_for

USAGE, UNAVAILABLE, REFUSED = ExitCode.USAGE, ExitCode.UNAVAILABLE, ExitCode.REFUSED
# Flags of `ftrain launch ... script.py`, and words of the message. {path} is a directory, {port} a free port.
FLAGS = [
    ("--no-such-flag", "No such option: --no-such-flag"),
    ("--nnodes 0", "--nnodes 0: needs 1 <= MIN <= MAX"),
    ("--nnodes 3:2", "--nnodes 3:2: needs 1 <= MIN <= MAX"),
    ("--nnodes two", "--nnodes two: give a number of nodes, or MIN:MAX"),
    ("--nproc-per-node 0", "--nproc-per-node 0: at least one process is needed"),
    ("--nproc-per-node many", "--nproc-per-node many: give a number, or one of gpu, cpu, auto"),
    ("--nproc-per-node gpu", "this node has no NVIDIA GPU that can be seen"),
    ("--max-restarts few", "Invalid value for '--max-restarts'"),
    ("--checkpoint-every often", "--checkpoint-every often: give a number of steps (100), a time (30s, 5m), or off"),
    ("--checkpoint-every 0s", "--checkpoint-every 0s"),
    ("--keep 0", "--keep 0: at least the newest commit has to be kept"),
    ("--persist-rate fast", "--persist-rate fast: give bytes a second such as 500MB, 2GB or 512MiB, or off"),
    (
        "--compress gzip",
        "--compress gzip: there are zstd, blosc-zstd, blosc-lz4, each also with a level, as in zstd:9; or off",
    ),
    ("--compress zstd:23", "--compress zstd:23: the levels of zstd go from 1 to 22; or off"),
    ("--disks a,,b", "--disks a,,b: give directories, separated by commas"),
    ("--disks s3://bucket/run", "--disks s3://bucket/run: give directories, separated by commas"),
    ("--run-dir run --disks run/a", "--disks: {path}/run/a is in {path}/run; give directories that are apart"),
    ("--run-dir run --disks .", "--disks: {path}/run is in {path}; give directories that are apart"),
    ("--run-dir run --disks script.py", "--disks: {path}/script.py cannot be used: File exists; give a directory that"),
    ("--run-dir run --disks /proc/disk", "--disks: /proc/disk cannot be used: No such file or directory"),
    ("--run-dir run --disks /etc", "--disks: /etc is not empty ("),
    ("--grace soon", "--grace soon: give a time such as 30s, 5m or 1h"),
    ("--lease 0s", "--lease 0s"),
    ("--redirects 4", "--redirects 4: give 0, 1 (stdout), 2 (stderr), 3 (both)"),
    ("--local-ranks-filter a", "--local-ranks-filter a: give local ranks such as 0,1"),
    ("--rdzv-conf nonsense", "--rdzv-conf nonsense: give key=value,key=value"),
    ("--run-dir {path}/script.py", "script.py: cannot be written (File exists); give a directory that can"),
    ("--run-dir /proc/run", "--run-dir /proc/run: cannot be written"),
    ("--log-dir /proc/logs --run-dir {path}/run", "--log-dir /proc/logs: cannot be written"),
    ("--run-dir ftp://bucket/run", "give a path, or a URL that begins with file:///, s3://, gs:// or az://"),
    ("--run-dir s3://bucket", "--run-dir s3://bucket: name a run in the bucket, as in s3://bucket/NAME"),
    ("--nnodes 2", "--nnodes 2: several nodes need --rdzv-endpoint HOST:PORT of node 0"),
    ("--nnodes 2 --rdzv-endpoint a:b", "--rdzv-endpoint a:b: give HOST:PORT"),
    ("--nnodes 2 --rdzv-endpoint a..b:1", "--rdzv-endpoint a..b:1: give HOST:PORT"),
    ("--nnodes 2 --rdzv-endpoint a:70000", "--rdzv-endpoint a:70000: ports go from 1 to 65535"),
    ("--nnodes 2 --rdzv-endpoint 127.0.0.1", "several nodes need --run-dir DIR, the same on each"),
    ("--nnodes 2 --node-rank 2 --rdzv-endpoint 127.0.0.1", "--node-rank 2: ranks of 2 nodes go from 0 to 1"),
]
# The same, after the flags that make it node 0 of two.
FLAGS_OF_TWO = [
    ("", "several nodes need a shared secret: make one with `ftrain secret FILE`"),
    ("--secret {path}/none.pem", "There is no secret at {path}/none.pem: make one with"),
    ("--secret {path}/nonsense.pem", "is not a run secret, or only a part of one"),
    ("--secret {path}/exposed.pem", "is open to others (mode 0644): run `chmod 600"),
    ("--secret {path}", "{path} is not a file, so it is not a run secret"),
]
# Whole commands.
COMMANDS = [
    ("launch", "Missing argument 'SCRIPT'"),
    ("no-such-command", "No such command 'no-such-command'"),
    ("launch {path}/missing.py", "missing.py: there is no such file; give the training script"),
    ("launch {path}", "is a directory; give the training script"),
    ("launch -m no.such.module", "-m no.such.module: there is no such module"),
    ("launch -m --no-python x", "-m and --no-python exclude each other"),
    ("secret {path}/secret.pem", "exists already and is not overwritten"),
    ("secret /proc/secret.pem", "cannot be written"),
    ("status {path}", "no run has been started here"),
    (
        "coordinator --run-dir {path}/run --secret {path}/secret.pem --rdzv-endpoint x:y",
        "--rdzv-endpoint x:y: give HOST:PORT",
    ),
]
TWO = "launch --nnodes 2 --node-rank 0 --rdzv-endpoint 127.0.0.1:{port} --run-dir {path}/run"
AT_ONCE = [
    *((f"launch {flags} {{path}}/script.py", words) for flags, words in FLAGS),
    *((f"{TWO} {flags} {{path}}/script.py", words) for flags, words in FLAGS_OF_TWO),
    *COMMANDS,
]
NOT_PLAIN = """
    import ftrain, torch
    class Counter:
        def state_dict(self): return {"seen": {"a set": {1, 2}}}
        def load_state_dict(self, state): pass
    run = ftrain.join()
    run.track(counter=Counter())
"""
TRAIN = """
    import sys, torch, ftrain
    run = ftrain.join()
    model = torch.nn.Linear(4, int(sys.argv[1]))
    run.track(**{"model" if len(sys.argv) < 3 else sys.argv[2]: model})
    for step in run.steps(2):
        with step:
            pass
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wrong")
    (path / "script.py").write_text("print('ran')")
    Secret.create(path / "secret.pem")
    Secret.create(path / "other.pem")
    Secret.create(path / "exposed.pem")
    (path / "nonsense.pem").write_text("nonsense")
    (path / "nonsense.pem").chmod(0o600)
    (path / "exposed.pem").chmod(0o644)
    return path


@pytest.fixture(scope="module")
def shared(place: Path) -> Iterator[Cluster]:
    yield from clusters(place)


def said(text: str) -> str:
    """What was said to the user, without the clock and typer's frame around its own messages."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", re.sub(r"^\d\d:\d\d:\d\d ", "", text, flags=re.M)).split())


@pytest.mark.parametrize(("arguments", "words"), AT_ONCE, ids=[case[0].replace("/", "_") for case in AT_ONCE])
def test_wrong_use_ends_at_once_with_2_and_a_sentence(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    words: str,
) -> None:
    if "per-node gpu" in arguments and visible_gpus():
        pytest.skip("there is a GPU here")
    names = {"path": place, "port": free_port()}
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["ftrain", *arguments.format(**names).split()])
    with pytest.raises(SystemExit) as ending:
        main()
    printed = capsys.readouterr()
    text = said(printed.out + printed.err)
    assert ending.value.code == USAGE, text
    assert words.format(**names) in text
    assert "Traceback" not in text
    assert "ran" not in text.split()


def ended(launcher: Any, code: int, *words: str) -> None:
    assert launcher.wait() == code, launcher.text
    for word in words:
        assert word in launcher.text
    assert "Traceback" not in launcher.text


def node(
    cluster: Cluster, rank: int, port: int, *more: object, secret: str = "secret.pem", wait: str = "3s"
) -> Launcher:
    run = cluster.path / f"run-{port}"
    flags = ("--nnodes", 2, "--node-rank", rank, "--rdzv-endpoint", f"127.0.0.1:{port}", "--run-dir", run)
    return cluster.launch(*flags, "--secret", cluster.path / secret, "--wait-for-node", wait, *more)


def test_too_few_nodes_in_time_end_with_69(shared: Cluster) -> None:
    ended(node(shared, 0, free_port(), "script.py"), UNAVAILABLE, "only 1 of 2 nodes were there after 3 s")


def test_no_coordinator_in_time_ends_with_69(shared: Cluster) -> None:
    ended(node(shared, 1, free_port(), "script.py"), UNAVAILABLE, "no coordinator answered for 3 s")


def test_port_that_something_else_has_ends_with_69(shared: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        launcher = node(shared, 0, port, "script.py")
        cause = f"Cannot listen on 127.0.0.1 port {port}: another process has it."
        ended(launcher, UNAVAILABLE, f"looking for a coordinator there: {cause}")
        assert f"no coordinator answered for 3 s. {cause}" in launcher.text.splitlines()[-1]


def test_master_port_that_something_else_has_ends_with_69(shared: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        launcher = shared.launch("--nproc-per-node", 1, "--master-port", port, shared.path / "script.py")
        ended(
            launcher,
            UNAVAILABLE,
            f"--master-port {port}: the ranks' store cannot listen there (Address already in use)",
        )


def test_other_secret_ends_with_77(shared: Cluster) -> None:
    port = free_port()
    first = node(shared, 0, port, "script.py", wait="10m")
    wait_for((shared.path / f"run-{port}" / "coordinator.json").exists, "the coordinator")
    ended(node(shared, 1, port, "script.py", secret="other.pem"), REFUSED, "does not hold this run's secret")
    assert first.process.poll() is None
    first.process.kill()
    first.wait()


def test_other_arguments_on_another_node_are_refused(shared: Cluster) -> None:
    port = free_port()
    nodes = [node(shared, rank, port, "script.py", "--lr", rank, wait="10m") for rank in (0, 1)]
    # Whoever comes second is refused.
    refused = wait_for(lambda: next((one for one in nodes if one.process.poll() is not None), None), "a refusal")
    ended(refused, USAGE, "this node was given another script, other arguments or another topology")
    for one in nodes:
        one.process.kill()
        one.wait()


def test_run_directory_in_use_is_refused(shared: Cluster) -> None:
    script = shared.script("import time; print('up'); time.sleep(600)", "waits.py")
    flags = ("--run-dir", shared.path / "used", script)
    first = shared.launch(*flags)
    wait_for((shared.path / "used" / "coordinator.json").exists, "the first")
    ended(shared.launch(*flags), USAGE, f"this run is being served by process {first.process.pid} already")
    first.process.kill()
    first.wait()


def test_not_plain_data_in_track_names_its_key(shared: Cluster) -> None:
    launcher = shared.launch(shared.script(NOT_PLAIN, "not_plain.py"))
    ended(launcher, USAGE, "counter.seen.a set: a value of type", "is neither a tensor nor plain data")
    assert "starting again" not in launcher.text


def test_other_model_than_the_commits_names_what_differs(shared: Cluster) -> None:
    script = shared.script(TRAIN, "train.py")
    flags = ("--run-dir", shared.path / "models", script)
    assert shared.launch(*flags, 4).wait() == 0
    wider = shared.launch(*flags, 8)
    renamed = shared.launch("--run-dir", shared.path / "models", script, 4, "net") if wider.wait() else None
    ended(wider, USAGE, "is of another model or optimizer", "model.weight (float32[4, 4] saved, float32[8, 4] here)")
    assert renamed is not None
    ended(renamed, USAGE, "the checkpoint has nothing tracked as 'net': it has model")


def test_damaged_journal_is_named(shared: Cluster) -> None:
    run = shared.path / "damaged"
    assert shared.launch("--run-dir", run, "script.py").wait() == 0
    record = run / "journal" / f"{1:020d}.json"
    record.write_bytes(record.read_bytes()[:-9])
    ended(shared.launch("--run-dir", run, "script.py"), ExitCode.STORAGE, f"journal/{1:020d}.json")


def test_run_directory_that_others_own_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "script.py").write_text("")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    command = [sys.executable, "-m", "ftrain.cli.main", "launch", "--run-dir", str(closed), str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == USAGE
    assert "cannot be written (Permission denied)" in done.stderr
