"""Runs one node of a job to its end: the agent, and on node 0 the coordinator beside it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import FrameType

from ftrain import __version__
from ftrain.agent import environment
from ftrain.agent.agent import Agent
from ftrain.agent.coordinator_host import CoordinatorHost
from ftrain.agent.interface import is_loopback, outward_address
from ftrain.cli import options
from ftrain.cli.policy import run_policy
from ftrain.control.client import Client, endpoint_text, fetch_status
from ftrain.control.secret import Secret
from ftrain.control.service import EVERYWHERE, LOOPBACK
from ftrain.core import messages as m
from ftrain.core import node
from ftrain.core.membership import FormationPolicy
from ftrain.errors import ExitCode, FtrainError, Unavailable, UsageError
from ftrain.spec import JobSpec
from ftrain.storage import open_run

log = logging.getLogger("ftrain")
WHEREABOUTS = "coordinator.json"
SECRET_NAME = "secret.pem"


def run_job(spec: JobSpec) -> int:
    """Run this node; prints how it ended and returns the exit code."""
    set_up_logging(f"ftrain{'' if spec.topology.single else f' node {spec.topology.node_rank}'}")
    signal.signal(signal.SIGTERM, _leave_before_start)  # until the agent has its own handler
    secret = _secret(spec)
    if spec.store_url:
        log.info("run in %s; logs, events and the secret in %s", spec.store_url, spec.run_dir)
    else:
        log.info("run directory %s%s", spec.run_dir, f", disks {', '.join(spec.disks)}" if spec.disks else "")
    open_run(spec.storage, spec.disks).check()
    try:
        exit = asyncio.run(_run(spec, secret))
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    return _conclude(exit, spec)


def _leave_before_start(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise SystemExit(int(ExitCode.PREEMPTED))


def set_up_logging(name: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [{name}] %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("ftrain")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _secret(spec: JobSpec) -> Secret:
    if spec.secret_path is not None:
        return Secret.load(spec.secret_path)
    path = spec.run_dir / SECRET_NAME
    return Secret.load(path) if path.exists() else Secret.create(path)


def _conclude(exit: node.Exit, spec: JobSpec) -> int:
    headline, _, details = exit.summary.partition("\n")
    sys.stdout.flush()
    if details:
        print(details.rstrip(), file=sys.stderr)
    log.log(logging.INFO if exit.code in (0, ExitCode.PREEMPTED) else logging.ERROR, "%s", headline or "done")
    if exit.code not in (0, ExitCode.UNAVAILABLE, ExitCode.REFUSED, ExitCode.USAGE):
        kept = f"checkpoints are in {spec.store_url}, logs in" if spec.store_url else "logs and checkpoints are in"
        log.info("%s %s; the same command with --run-dir %s goes on", kept, spec.run_dir, spec.storage)
    return exit.code


async def _run(spec: JobSpec, secret: Secret) -> node.Exit:
    topology = spec.topology
    host, refusal = await _host(spec, secret)
    address, port = topology.host, topology.port
    if host is not None:
        address, port = ("127.0.0.1" if topology.loopback else topology.host), host[1]
    client = Client(f"[{address}]:{port}" if ":" in address else f"{address}:{port}", secret)
    agent = Agent(spec, await _hello(spec, address, port), client, open_run(spec.storage, spec.disks), secret)
    agent_task = asyncio.create_task(agent.run())
    if host is None:
        exit = await agent_task
        if refusal and exit.code == ExitCode.UNAVAILABLE and not agent.welcomed:
            return node.Exit(exit.code, f"{exit.summary}. {refusal}")
        return exit
    host_task = asyncio.create_task(host[0].run())
    await asyncio.wait({agent_task, host_task}, return_when=asyncio.FIRST_COMPLETED)
    if not agent_task.done():
        # The coordinator ended first: its last word to this agent was sent before.
        with suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(agent_task), 5)
        ended = host_task.result()
        agent.finish(node.Exit(ended.code, ended.summary))
        return await agent_task
    # Other nodes are still told that the run is over, if it is.
    await asyncio.wait({host_task}, timeout=host[0].policy.goodbye_seconds + 1 if host[0].leaving else 0)
    if not host_task.done():
        host_task.cancel()
        await asyncio.wait({host_task})
    return agent_task.result()


async def _host(spec: JobSpec, secret: Secret) -> tuple[tuple[CoordinatorHost, int] | None, str]:
    """The coordinator and its port, if its place is on this node. If something else has that port: none, and why."""
    topology = spec.topology
    first = topology.node_rank == 0 or (topology.node_rank < 0 and options.is_local(topology.host))
    if not first or await _is_served_elsewhere(spec, secret):
        return None, ""
    _check_unused(spec.run_dir, topology.port)
    hosts = LOOPBACK if topology.loopback else EVERYWHERE
    formation = FormationPolicy(topology.nodes_min, topology.nodes_max, spec.wait_seconds, spec.last_call_seconds)
    policy = run_policy(
        spec.run_id, formation, spec.restart, spec.checkpoint, spec.lease_seconds, spec.stop_grace_seconds
    )
    host = CoordinatorHost(policy, open_run(spec.storage), secret, hosts, topology.port, spec.run_dir)
    try:
        port = await host.start()
    except Unavailable as error:
        # `ftrain coordinator` may serve there. If it is something else, that is said in the end, too.
        log.info("looking for a coordinator there: %s", error)
        await host.close()
        return None, str(error)
    write_whereabouts(spec.run_dir, "127.0.0.1" if topology.loopback else topology.host, port)
    return (host, port), ""


async def _is_served_elsewhere(spec: JobSpec, secret: Secret) -> bool:
    """Whether the endpoint is another host's, and `ftrain coordinator` answers there."""
    topology = spec.topology
    if topology.single or options.is_local(topology.host):
        return False
    try:
        await fetch_status(endpoint_text(topology.host, topology.port), secret)
    except FtrainError:
        return False  # nobody yet: the endpoint may be a name for this host that it does not know itself
    log.info("a coordinator serves at %s", endpoint_text(topology.host, topology.port))
    return True


def write_whereabouts(run_dir: Path, host: str, port: int) -> None:
    """Where `ftrain status` finds the coordinator; a hint, never trusted, and not worth the run on a full disk."""
    path = run_dir / WHEREABOUTS
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    found = {"host": host, "port": port, "pid": os.getpid(), "on": socket.gethostname(), "since": time.time()}
    try:
        temporary.write_text(json.dumps(found))
        temporary.replace(path)
    except OSError as error:
        log.warning("%s cannot be written: %s; `ftrain status` will not find this run", path, error.strerror)
        temporary.unlink(missing_ok=True)


def _check_unused(run_dir: Path, port: int) -> None:
    """Two launchers must not share a run by mistake. (If they do all the same, the journal lets only one go on.)"""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((run_dir / WHEREABOUTS).read_text())
        command = Path(f"/proc/{int(found['pid'])}/cmdline").read_bytes()
        if found["port"] == port:
            return  # `ftrain coordinator` at this run's own endpoint
        if found["on"] == socket.gethostname() and b"ftrain" in command and int(found["pid"]) != os.getpid():
            raise UsageError(
                f"--run-dir {run_dir}: this run is being served by process {found['pid']} already; "
                "stop that first, or give another directory"
            )


async def _hello(spec: JobSpec, address: str, port: int) -> m.Hello:
    topology = spec.topology
    own = topology.local_address or (
        "127.0.0.1" if topology.loopback else await options.own_address(address, port, spec.wait_seconds)
    )
    if is_loopback(own) and not topology.loopback:  # the endpoint's name is another address to the other nodes
        own = outward_address() or own
    return m.Hello(
        node=uuid.uuid4().hex,
        node_rank=topology.node_rank,
        processes=topology.processes,
        address=own,
        host=socket.gethostname(),
        pid=os.getpid(),
        run_id=spec.run_id,
        job_sha256=spec.digest,
        version=__version__,
        term_seen=0,
        joins=environment.joins(spec.program),
    )
