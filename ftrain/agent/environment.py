"""The environment that a worker finds: what torchrun sets, name for name, and nothing of ours but `FTRAIN_BOOT`."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path

from ftrain.agent import heap
from ftrain.agent.interface import interface_of
from ftrain.core.messages import Start
from ftrain.spec import JobSpec, Program

# What training imports sooner or later, torch._dynamo at the first optimizer step.
TRAINING_MODULES = (
    "numpy",
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.utils.data",
    "torch.optim",
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "ftrain.worker",
    "ftrain.worker.destroyed_groups",
)


def nursery(spec: JobSpec, address: str) -> dict[str, str]:
    """For the nursery itself: beside `base` what only a new program can be told, and its forks then have from it."""
    environment = base(spec, address)
    own = environment.get("GLIBC_TUNABLES", "")
    environment["GLIBC_TUNABLES"] = ":".join(filter(None, (heap.TUNABLES, own)))  # of two settings the later counts
    return environment


def base(spec: JobSpec, address: str) -> dict[str, str]:
    """For the nursery and everything below it, on the node that others reach at `address`."""
    environment = {**os.environ, **spec.environment}
    if spec.topology.processes > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")  # as torchrun: else every process would take every core
    if spec.topology.loopback:
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    elif interface := interface_of(address):
        # Left to itself gloo looks the host's name up, which on many hosts is an address of the loopback interface.
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    # Large CPU tensors on huge pages: touched for the first time several times quicker (docs/decisions/0011).
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return environment


def worker(spec: JobSpec, start: Start, rank: int, local_rank: int, error_file: Path, address: str) -> dict[str, str]:
    """For one worker of one generation."""
    return {
        **base(spec, address),
        "LOCAL_RANK": str(local_rank),
        "RANK": str(rank),
        "GROUP_RANK": str(start.group_rank),
        "ROLE_RANK": str(rank),
        "ROLE_NAME": spec.role,
        "LOCAL_WORLD_SIZE": str(spec.topology.processes),
        "WORLD_SIZE": str(start.world_size),
        "GROUP_WORLD_SIZE": str(start.group_size),
        "ROLE_WORLD_SIZE": str(start.world_size),
        "MASTER_ADDR": start.master_address,
        "MASTER_PORT": str(start.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(start.restarts),
        "TORCHELASTIC_MAX_RESTARTS": str(start.max_restarts),
        "TORCHELASTIC_RUN_ID": spec.run_id,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_ERROR_FILE": str(error_file),
    }


def preload(program: Program) -> tuple[str, ...]:
    """The modules that the nursery imports: torch's, and those installed ones that the script itself imports first."""
    if program.kind == "exec":
        return ()
    path = _file(program)
    return (*TRAINING_MODULES, *(_installed_imports(path) if path is not None else ()))


def joins(program: Program) -> bool:
    """Whether the script itself, as it is written, calls `ftrain.join()`: one that does it by way of others may too."""
    path = _file(program)
    tree = _parsed(path) if path is not None else None
    found = list(ast.walk(tree)) if tree is not None else []
    imported = [alias for node in found if isinstance(node, ast.Import) for alias in node.names]
    names = {alias.asname or alias.name for alias in imported if alias.name == "ftrain"}
    taken = {
        alias.name
        for node in found
        if isinstance(node, ast.ImportFrom) and node.module == "ftrain"
        for alias in node.names
    }
    return "join" in taken or any(
        isinstance(node.value, ast.Name) and node.value.id in names
        for node in found
        if isinstance(node, ast.Attribute) and node.attr == "join"
    )


def _file(program: Program) -> Path | None:
    if program.kind == "exec":
        return None
    return Path(program.target) if program.kind == "script" else _module_file(program.target)


def _parsed(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None  # the worker will meet the same, and say so


def _module_file(name: str) -> Path | None:
    try:
        found = importlib.util.find_spec(name.split(".")[0])
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found is not None and found.origin and name.count(".") == 0 else None


def _installed_imports(path: Path) -> tuple[str, ...]:
    """Modules that the script imports at its top level and that live in this Python's installation.

    The user's own modules are left to the worker: they may change between two generations.
    """
    tree = _parsed(path)
    names: list[str] = []
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.append(node.module)
    return tuple(name for name in dict.fromkeys(names) if _installed(name))


def _installed(name: str) -> bool:
    top = name.split(".")[0]
    if top in sys.stdlib_module_names or top == "ftrain":
        return False
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None and "site-packages" in found.origin
