"""`ftrain launch`: torchrun's command line, and a few flags of our own."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ftrain.cli import options
from ftrain.cli.running import run_job
from ftrain.core.supervision import RestartPolicy
from ftrain.errors import UsageError
from ftrain.spec import DEFAULT_RUN_ID, STOP_GRACE_SECONDS, JobSpec, Output, Program, Topology

_SAME = "Accepted because torchrun has it; ftrain needs no such setting."
_TORCHRUN = "torchrun's flags without effect here"


def launch(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="The training script, or a module with -m.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS...", help="Arguments for the script.")] = None,
    nnodes: Annotated[str, typer.Option("--nnodes", help="Number of nodes, or MIN:MAX.")] = "1",
    nproc_per_node: Annotated[
        str, typer.Option("--nproc-per-node", "--nproc_per_node", help="Processes here: a number, gpu, cpu or auto.")
    ] = "1",
    node_rank: Annotated[
        int, typer.Option("--node-rank", "--node_rank", help="This node's rank; rank 0 hosts the coordinator.")
    ] = -1,
    rdzv_endpoint: Annotated[
        str, typer.Option("--rdzv-endpoint", "--rdzv_endpoint", help="HOST:PORT of the coordinator.")
    ] = "",
    rdzv_id: Annotated[
        str, typer.Option("--rdzv-id", "--rdzv_id", help="Name of the run, equal on all nodes.")
    ] = DEFAULT_RUN_ID,
    rdzv_conf: Annotated[
        str, typer.Option("--rdzv-conf", "--rdzv_conf", help="join_timeout=SECONDS, last_call_timeout=SECONDS.")
    ] = "",
    standalone: Annotated[bool, typer.Option("--standalone", help="One node, no endpoint needed.")] = False,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            "--max-restarts",
            "--max_restarts",
            help="Restarts before giving up. Left out: no limit while commits advance, 3 without progress.",
        ),
    ] = None,
    module: Annotated[bool, typer.Option("-m", "--module", help="SCRIPT is a module, run as python -m does.")] = False,
    no_python: Annotated[
        bool, typer.Option("--no-python", "--no_python", help="SCRIPT is a program, not run by Python.")
    ] = False,
    log_dir: Annotated[
        Path | None, typer.Option("--log-dir", "--log_dir", help="For the ranks' output; default RUN_DIR/logs.")
    ] = None,
    redirects: Annotated[
        str, typer.Option("-r", "--redirects", help="Streams that go to files only: 0, 1, 2, 3 or a map.")
    ] = "0",
    tee: Annotated[
        str, typer.Option("-t", "--tee", help="Streams that go to files and terminal; all do unless redirected.")
    ] = "0",
    local_ranks_filter: Annotated[
        str, typer.Option("--local-ranks-filter", "--local_ranks_filter", help="Only these ranks on the terminal.")
    ] = "",
    role: Annotated[str, typer.Option("--role", help="ROLE_NAME for the workers.")] = "default",
    master_addr: Annotated[
        str, typer.Option("--master-addr", "--master_addr", help="The endpoint's host, as older scripts give it.")
    ] = "",
    master_port: Annotated[
        int,
        typer.Option(
            "--master-port",
            "--master_port",
            help="One node: MASTER_PORT. Several: the endpoint's port, as older scripts give it.",
            min=0,
            max=65535,
        ),
    ] = 0,
    local_addr: Annotated[
        str, typer.Option("--local-addr", "--local_addr", help="Address by which other nodes reach this one.")
    ] = "",
    shutdown_timeout: Annotated[
        float,
        typer.Option("--shutdown-timeout", "--shutdown_timeout", help="Seconds from SIGTERM to SIGKILL for workers."),
    ] = STOP_GRACE_SECONDS,
    run_dir: Annotated[
        str,
        typer.Option(
            "--run-dir",
            help="Journal, checkpoints, logs; an existing one is continued. Default ./runs/... With s3://, gs:// or "
            "az:// journal and checkpoints go there, the rest to --log-dir or ./runs/...",
        ),
    ] = "",
    checkpoint_every: Annotated[
        str, typer.Option("--checkpoint-every", help="Steps (100), time (30s, 5m), or off.")
    ] = "60s",
    snapshot_every: Annotated[
        str,
        typer.Option(
            "--snapshot-every",
            help="In memory, between commits: steps (10), time (10s), off, or auto: each step where that costs little "
            "and a rank has no replica.",
        ),
    ] = "auto",
    keep: Annotated[int, typer.Option("--keep", help="So many of the newest commits stay.")] = 2,
    keep_every: Annotated[
        str, typer.Option("--keep-every", help="One commit stays every so often: steps (1000), time (6h), or off.")
    ] = "off",
    keep_best: Annotated[
        list[str] | None,
        typer.Option("--keep-best", help="The best by a logged metric stay: 2:loss, or 2:accuracy:max; repeatable."),
    ] = None,
    persist_rate: Annotated[
        str, typer.Option("--persist-rate", help="A second, to storage, from this node: 500MB, 2GB, 1.5GiB, or off.")
    ] = "off",
    compress: Annotated[
        str,
        typer.Option("--compress", help="Checkpoints: zstd, blosc-zstd or blosc-lz4, with a level: zstd:9; or off."),
    ] = "off",
    disks: Annotated[
        str,
        typer.Option(
            "--disks",
            help="DIR1,DIR2: checkpoints are spread over the run directory and these, which all nodes see alike.",
        ),
    ] = "",
    secret: Annotated[
        Path | None, typer.Option("--secret", help="The run's secret (`ftrain secret FILE`), for several nodes.")
    ] = None,
    wait_for_node: Annotated[
        str, typer.Option("--wait-for-node", help="How long to wait for missing nodes, or for the coordinator.")
    ] = "10m",
    grace: Annotated[str, typer.Option("--grace", help="After SIGTERM: time to save the last step and leave.")] = "25s",
    lease: Annotated[
        str, typer.Option("--lease", help="A node out of reach for so long counts as lost by then.")
    ] = "10s",
    peer_copies: Annotated[
        str, typer.Option("--peer-copies", help="Each node's memory is backed by the next one's: on or off.")
    ] = "on",
    rdzv_backend: Annotated[
        str, typer.Option("--rdzv-backend", "--rdzv_backend", help=_SAME, rich_help_panel=_TORCHRUN)
    ] = "",
    monitor_interval: Annotated[
        float, typer.Option("--monitor-interval", "--monitor_interval", help=_SAME, rich_help_panel=_TORCHRUN)
    ] = 0.1,
    start_method: Annotated[
        str, typer.Option("--start-method", "--start_method", help=_SAME, rich_help_panel=_TORCHRUN)
    ] = "fork",
) -> None:
    """Start or continue a training job on this node."""
    del rdzv_backend, monitor_interval, start_method
    program = _program(script, tuple(arguments or ()), module, no_python)
    topology = _topology(
        nnodes, nproc_per_node, node_rank, rdzv_endpoint, standalone, master_addr, master_port, local_addr
    )
    conf = options.rendezvous(rdzv_conf)
    wait = options.seconds(conf.get("join_timeout", wait_for_node), "--wait-for-node")
    store_url, directory = _run_dir(run_dir, log_dir, topology, program)
    logs = log_dir if log_dir is not None else directory / "logs"
    logs = options.directory(logs, "--log-dir", lambda path: path.mkdir(parents=True, exist_ok=True))
    if not topology.single and secret is None:
        raise UsageError(
            "several nodes need a shared secret: make one with `ftrain secret FILE`, give --secret FILE on each"
        )
    spec = JobSpec(
        program=program,
        topology=topology,
        run_id=rdzv_id,
        run_dir=directory,
        output=_output(logs, redirects, tee, local_ranks_filter, topology.processes),
        directory=Path.cwd(),
        secret_path=secret,
        role=role,
        restart=RestartPolicy(max_restarts=max_restarts),
        checkpoint=options.checkpoints(
            checkpoint_every, snapshot_every, options.retention(keep, keep_every, keep_best or ())
        ),
        grace_seconds=options.seconds(grace, "--grace"),
        wait_seconds=wait,
        lease_seconds=options.some_seconds(lease, "--lease"),
        last_call_seconds=options.seconds(conf.get("last_call_timeout", "5"), "--rdzv-conf last_call_timeout"),
        stop_grace_seconds=shutdown_timeout,
        peer_copies=options.switch(peer_copies, "--peer-copies"),
        persist_bytes_per_second_max=options.rate(persist_rate, "--persist-rate"),
        compress=options.codec(compress, "--compress"),
        disks=options.disks(disks),
        store_url=store_url,
    )
    raise typer.Exit(run_job(spec))


def _program(script: str, arguments: tuple[str, ...], module: bool, no_python: bool) -> Program:
    if module and no_python:
        raise UsageError("-m and --no-python exclude each other: a module is run by Python")
    if no_python:
        return Program("exec", script, arguments)
    if module:
        sys.path.insert(0, os.getcwd())
        try:
            found = importlib.util.find_spec(script)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise UsageError(f"-m {script}: there is no such module; is it installed, or below {os.getcwd()}?")
        return Program("module", script, arguments)
    path = Path(script)
    if not path.is_file():
        kind = "is a directory" if path.is_dir() else "there is no such file"
        raise UsageError(f"{script}: {kind}; give the training script (or -m MODULE, or --no-python PROGRAM)")
    return Program("script", script, arguments)


def _topology(
    nnodes: str,
    nproc: str,
    node_rank: int,
    endpoint: str,
    standalone: bool,
    master_addr: str,
    master_port: int,
    local_addr: str,
) -> Topology:
    low, high = options.nodes(nnodes)
    count = options.processes(nproc)
    if standalone:
        low = high = 1
    if high == 1:
        return Topology(1, 1, 0, count, store_port=master_port)
    if not endpoint and master_addr:
        endpoint = f"{master_addr}:{master_port or options.DEFAULT_PORT}"
    if not endpoint:
        raise UsageError(f"--nnodes {nnodes}: several nodes need --rdzv-endpoint HOST:PORT of node 0")
    if node_rank >= high:
        raise UsageError(f"--node-rank {node_rank}: ranks of {high} nodes go from 0 to {high - 1}")
    host, port = options.endpoint(endpoint)
    return Topology(low, high, max(node_rank, -1), count, host, port, local_addr)


def _run_dir(asked: str, log_dir: Path | None, topology: Topology, program: Program) -> tuple[str, Path]:
    """The URL of the run if it is in an object store, and its directory on this node."""
    if not asked and not topology.single:
        raise UsageError("several nodes need --run-dir DIR, the same on each, on storage that all of them see")
    if not asked:
        name = program.target if program.kind == "module" else Path(program.target).stem
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
        asked = str(Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    url, place = options.run_place(asked, "--run-dir")
    if url and log_dir is not None:
        place = log_dir
    return url, options.directory(place, "--run-dir", lambda path: path.mkdir(parents=True, exist_ok=True))


def _output(logs: Path, redirects: str, tee: str, shown: str, count: int) -> Output:
    to_file = options.streams(redirects, count, "--redirects")
    teed = options.streams(tee, count, "--tee")
    return Output(logs, to_file[0] - teed[0], to_file[1] - teed[1], options.ranks(shown))
