"""What a user asked `ftrain launch` for: parsed once, then frozen."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from ftrain.core.codec import Codec
from ftrain.core.schedule import CheckpointPolicy
from ftrain.core.supervision import RestartPolicy

DEFAULT_RUN_ID = "run"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
STOP_GRACE_SECONDS = 30.0  # from SIGTERM to SIGKILL for scripts that never joined: what torchrun gives them


@dataclass(frozen=True, slots=True)
class Program:
    """What each worker runs. `kind`: "script" (a path), "module" (a name), "exec" (any program)."""

    kind: str
    target: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """How many nodes, and this node's place and processes."""

    nodes_min: int
    nodes_max: int
    node_rank: int  # -1: any
    processes: int
    host: str = "127.0.0.1"  # of the rendezvous endpoint
    port: int = 0  # 0: any free port, single node only
    local_address: str = ""  # where other nodes reach this one; "" finds it out
    store_port: int = 0  # of the ranks' store, MASTER_PORT; 0: any free port. Single node only

    @property
    def single(self) -> bool:
        return self.nodes_max == 1

    @property
    def loopback(self) -> bool:
        """All nodes of the run are on this host."""
        return self.single or self.host in LOOPBACK_HOSTS


@dataclass(frozen=True, slots=True)
class Output:
    """Where each local rank's streams go. Sets hold local ranks."""

    directory: Path
    quiet_stdout: frozenset[int] = frozenset()  # to the file only (--redirects without --tee)
    quiet_stderr: frozenset[int] = frozenset()
    shown: frozenset[int] | None = None  # --local-ranks-filter; None shows all


@dataclass(frozen=True, slots=True)
class JobSpec:
    program: Program
    topology: Topology
    run_id: str
    run_dir: Path  # on this node: logs, events, the secret
    output: Output
    directory: Path = Path()  # where workers start
    secret_path: Path | None = None
    role: str = "default"
    restart: RestartPolicy = RestartPolicy()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    grace_seconds: float = 25.0
    wait_seconds: float = 600.0
    lease_seconds: float = 10.0
    last_call_seconds: float = 5.0
    stop_grace_seconds: float = STOP_GRACE_SECONDS
    peer_copies: bool = True  # nodes keep copies of one another's snapshots and private state
    environment: dict[str, str] = field(default_factory=dict)
    persist_bytes_per_second_max: int = 0  # that this node's ranks together write to storage; 0 for no bound
    compress: Codec | None = None  # what this node's ranks write to storage
    disks: tuple[str, ...] = ()  # to which new packs go, beside the run directory
    store_url: str = ""  # of the journal and the checkpoints, where they are not in the run directory

    @property
    def storage(self) -> str:
        """What `open_storage` takes: all nodes see the same there."""
        return self.store_url or str(self.run_dir)

    @property
    def digest(self) -> str:
        """Equal on all nodes of one job: program, arguments and number of nodes, not this node's own place."""
        topology = self.topology
        parts = (
            self.program.kind,
            self.program.target,
            *self.program.arguments,
            topology.nodes_min,
            topology.nodes_max,
        )
        return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()
