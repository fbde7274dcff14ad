"""`ftrain coordinator`: the coordinator outside of any node, so that no node's loss takes it along."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path
from typing import Annotated

import typer

from ftrain.agent.coordinator_host import CoordinatorHost
from ftrain.cli import options
from ftrain.cli.policy import run_policy
from ftrain.cli.running import set_up_logging, write_whereabouts
from ftrain.control.secret import Secret
from ftrain.control.service import EVERYWHERE, LOOPBACK
from ftrain.core.membership import FormationPolicy
from ftrain.core.run_state import Exit, RunPolicy
from ftrain.core.supervision import RestartPolicy
from ftrain.errors import ExitCode
from ftrain.spec import DEFAULT_RUN_ID, LOOPBACK_HOSTS, STOP_GRACE_SECONDS
from ftrain.storage import Storage, open_run

log = logging.getLogger("ftrain")


def coordinator(
    run_dir: Annotated[
        str, typer.Option("--run-dir", help="Journal and checkpoints, as the nodes see them: a directory or a URL.")
    ],
    secret: Annotated[Path, typer.Option("--secret", help="The run's secret (`ftrain secret FILE`).")],
    rdzv_endpoint: Annotated[
        str, typer.Option("--rdzv-endpoint", "--rdzv_endpoint", help="HOST:PORT to serve at, as the nodes give it.")
    ],
    nnodes: Annotated[str, typer.Option("--nnodes", help="Number of nodes, or MIN:MAX.")] = "1",
    rdzv_id: Annotated[str, typer.Option("--rdzv-id", "--rdzv_id", help="Name of the run.")] = DEFAULT_RUN_ID,
    max_restarts: Annotated[int | None, typer.Option("--max-restarts", "--max_restarts", help="As in launch.")] = None,
    checkpoint_every: Annotated[str, typer.Option("--checkpoint-every", help="As in launch.")] = "60s",
    snapshot_every: Annotated[str, typer.Option("--snapshot-every", help="As in launch.")] = "auto",
    keep: Annotated[int, typer.Option("--keep", help="As in launch.")] = 2,
    keep_every: Annotated[str, typer.Option("--keep-every", help="As in launch.")] = "off",
    keep_best: Annotated[list[str] | None, typer.Option("--keep-best", help="As in launch.")] = None,
    wait_for_node: Annotated[str, typer.Option("--wait-for-node", help="As in launch.")] = "10m",
    lease: Annotated[str, typer.Option("--lease", help="As in launch.")] = "10s",
) -> None:
    """Serve one run until it is over."""
    set_up_logging("ftrain coordinator")
    low, high = options.nodes(nnodes)
    policy = run_policy(
        rdzv_id,
        FormationPolicy(low, high, options.seconds(wait_for_node, "--wait-for-node")),
        RestartPolicy(max_restarts=max_restarts),
        options.checkpoints(checkpoint_every, snapshot_every, options.retention(keep, keep_every, keep_best or ())),
        options.some_seconds(lease, "--lease"),
        STOP_GRACE_SECONDS,
    )
    host, port = options.endpoint(rdzv_endpoint)
    url, place = options.run_place(run_dir, "--run-dir")
    directory = options.directory(place, "--run-dir", lambda path: path.mkdir(parents=True, exist_ok=True))
    storage = open_run(url or str(directory))
    storage.check()
    exit = asyncio.run(_serve(policy, storage, directory, Secret.load(secret), host, port))
    log.info("%s", exit.summary.partition("\n")[0])
    raise typer.Exit(exit.code)


async def _serve(policy: RunPolicy, storage: Storage, run_dir: Path, secret: Secret, host: str, port: int) -> Exit:
    hosts = LOOPBACK if host in LOOPBACK_HOSTS else EVERYWHERE
    service = CoordinatorHost(policy, storage, secret, hosts, port, run_dir)
    port = await service.start()
    write_whereabouts(run_dir, host, port)
    log.info("serving run %s at %s:%d", storage.url, host, port)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    running = asyncio.create_task(service.run())
    await asyncio.wait({running, asyncio.create_task(stopped.wait())}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        return running.result()
    # Nothing is lost: the next coordinator reads the journal, and training goes on meanwhile.
    running.cancel()
    await asyncio.wait({running})
    return Exit(int(ExitCode.PREEMPTED), "stopped; start it again to go on serving this run")
