"""What people get wrong: each ends with its exit code and one sentence that says what to do. docs/errors.md shows them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftrain.cli.main import main
from ftrain.cli.options import visible_gpus
from ftrain.control.secret import Secret
from ftrain.errors import ExitCode
from tests.launching.harness import Cluster, Launcher, clusters, free_port, wait_for

USAGE, UNAVAILABLE, REFUSED = ExitCode.USAGE, ExitCode.UNAVAILABLE, ExitCode.REFUSED
TWO = "--nnodes 2 --node-rank 0 --rdzv-endpoint 127.0.0.1:{port} --run-dir {path}/run"
# Arguments of `ftrain`, exit code, words of the message. {path} is a directory, {port} a free port.
AT_ONCE = [
    ("launch --no-such-flag {path}/script.py", USAGE, "No such option: --no-such-flag"),
    ("launch", USAGE, "Missing argument 'SCRIPT'"),
    ("no-such-command", USAGE, "No such command 'no-such-command'"),
    ("launch {path}/missing.py", USAGE, "missing.py: there is no such file; give the training script"),
    ("launch {path}", USAGE, "is a directory; give the training script"),
    ("launch -m no.such.module", USAGE, "-m no.such.module: there is no such module"),
    ("launch -m --no-python x", USAGE, "-m and --no-python exclude each other"),
    ("launch --nnodes 0 {path}/script.py", USAGE, "--nnodes 0: needs 1 <= MIN <= MAX"),
    ("launch --nnodes 3:2 {path}/script.py", USAGE, "--nnodes 3:2: needs 1 <= MIN <= MAX"),
    ("launch --nnodes two {path}/script.py", USAGE, "--nnodes two: give a number of nodes, or MIN:MAX"),
    ("launch --nproc-per-node 0 {path}/script.py", USAGE, "--nproc-per-node 0: at least one process is needed"),
    ("launch --nproc-per-node many {path}/script.py", USAGE, "--nproc-per-node many: give a number, or one of gpu, cpu, auto"),
    ("launch --nproc-per-node gpu {path}/script.py", USAGE, "this node has no NVIDIA GPU that can be seen"),
    ("launch --max-restarts few {path}/script.py", USAGE, "Invalid value for '--max-restarts'"),
    ("launch --checkpoint-every often {path}/script.py", USAGE, "--checkpoint-every often: give a number of steps (100), a time (30s, 5m), or off"),
    ("launch --checkpoint-every 0s {path}/script.py", USAGE, "--checkpoint-every 0s"),
    ("launch --keep 0 {path}/script.py", USAGE, "--keep 0: at least the newest commit has to be kept"),
    ("launch --grace soon {path}/script.py", USAGE, "--grace soon: give a time such as 30s, 5m or 1h"),
    ("launch --lease 0s {path}/script.py", USAGE, "--lease 0s"),
    ("launch --redirects 4 {path}/script.py", USAGE, "--redirects 4: give 0, 1 (stdout), 2 (stderr), 3 (both)"),
    ("launch --local-ranks-filter a {path}/script.py", USAGE, "--local-ranks-filter a: give local ranks such as 0,1"),
    ("launch --rdzv-conf nonsense {path}/script.py", USAGE, "--rdzv-conf nonsense: give key=value,key=value"),
    ("launch --run-dir {path}/script.py {path}/script.py", USAGE, "script.py: cannot be written (File exists); give a directory that can"),
    ("launch --run-dir /proc/run {path}/script.py", USAGE, "--run-dir /proc/run: cannot be written"),
    ("launch --log-dir /proc/logs --run-dir {path}/run {path}/script.py", USAGE, "--log-dir /proc/logs: cannot be written"),
    ("launch --run-dir s3://bucket/run {path}/script.py", USAGE, "only directories are supported"),
    ("launch --nnodes 2 {path}/script.py", USAGE, "--nnodes 2: several nodes need --rdzv-endpoint HOST:PORT of node 0"),
    ("launch --nnodes 2 --rdzv-endpoint a:b {path}/script.py", USAGE, "--rdzv-endpoint a:b: give HOST:PORT"),
    ("launch --nnodes 2 --rdzv-endpoint a:70000 {path}/script.py", USAGE, "--rdzv-endpoint a:70000: ports go from 1 to 65535"),
    ("launch --nnodes 2 --rdzv-endpoint 127.0.0.1 {path}/script.py", USAGE, "several nodes need --run-dir DIR, the same on each"),
    ("launch --nnodes 2 --node-rank 2 --rdzv-endpoint 127.0.0.1 {path}/script.py", USAGE, "--node-rank 2: ranks of 2 nodes go from 0 to 1"),
    (f"launch {TWO} {{path}}/script.py", USAGE, "several nodes need a shared secret: make one with `ftrain secret FILE`"),
    (f"launch {TWO} --secret {{path}}/none.pem {{path}}/script.py", USAGE, "There is no secret at {path}/none.pem: make one with"),
    (f"launch {TWO} --secret {{path}}/nonsense.pem {{path}}/script.py", USAGE, "is not a run secret, or only a part of one"),
    (f"launch {TWO} --secret {{path}}/exposed.pem {{path}}/script.py", USAGE, "is open to others (mode 0644): run `chmod 600"),
    (f"launch {TWO} --secret {{path}} {{path}}/script.py", USAGE, "{path} is not a file, so it is not a run secret"),
    ("secret {path}/secret.pem", USAGE, "exists already and is not overwritten"),
    ("secret /proc/secret.pem", USAGE, "cannot be written"),
    ("status {path}", USAGE, "no run has been started here"),
    ("coordinator --run-dir {path}/run --secret {path}/secret.pem --rdzv-endpoint x:y", USAGE, "--rdzv-endpoint x:y: give HOST:PORT"),
]  # fmt: skip
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


@pytest.mark.parametrize(("arguments", "code", "words"), AT_ONCE, ids=[case[0].replace("/", "_") for case in AT_ONCE])
def test_wrong_use_ends_at_once_with_one_sentence(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    code: int,
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
    assert ending.value.code == code, text
    assert words.format(**names) in text
    assert "Traceback" not in text
    assert "ran" not in text.split()


def ended(launcher: Launcher, code: int, *words: str) -> None:
    assert launcher.wait() == code, launcher.text
    for word in words:
        assert word in launcher.text
    assert "Traceback" not in launcher.text


def node(cluster: Cluster, rank: int, port: int, *more: object, secret: str = "secret.pem") -> Launcher:
    run = cluster.path / f"run-{port}"
    flags = ("--nnodes", 2, "--node-rank", rank, "--rdzv-endpoint", f"127.0.0.1:{port}", "--run-dir", run)
    return cluster.launch(*flags, "--secret", cluster.path / secret, "--wait-for-node", "3s", *more)


def test_too_few_nodes_in_time_end_with_69(shared: Cluster) -> None:
    ended(node(shared, 0, free_port(), "script.py"), UNAVAILABLE, "only 1 of 2 nodes were there after 3 s")


def test_no_coordinator_in_time_ends_with_69(shared: Cluster) -> None:
    ended(node(shared, 1, free_port(), "script.py"), UNAVAILABLE, "no coordinator answered for 3 s")


def test_port_that_something_else_has_ends_with_69(shared: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        launcher = node(shared, 0, port, "script.py")
        ended(launcher, UNAVAILABLE, f"Cannot listen on 127.0.0.1 port {port}: another process has it")


def test_other_secret_ends_with_77(shared: Cluster) -> None:
    port = free_port()
    first = node(shared, 0, port, "script.py")
    wait_for((shared.path / f"run-{port}" / "coordinator.json").exists, "the coordinator")
    ended(node(shared, 1, port, "script.py", secret="other.pem"), REFUSED, "does not hold this run's secret")
    ended(first, UNAVAILABLE)


def test_other_arguments_on_another_node_are_refused(shared: Cluster) -> None:
    port = free_port()
    first = node(shared, 0, port, "script.py", "--lr", "1")
    first.says("run directory")
    wait_for((shared.path / f"run-{port}" / "coordinator.json").exists, "the coordinator")
    second = node(shared, 1, port, "script.py", "--lr", "2")
    codes = sorted((first.wait(), second.wait()))
    assert codes == [USAGE, UNAVAILABLE], first.text + second.text
    assert "this node was given another script, other arguments or another topology" in first.text + second.text


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
    ended(launcher, USAGE, "counter.state")
    assert "a set" in launcher.text


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
