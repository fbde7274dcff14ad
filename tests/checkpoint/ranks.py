"""Real ranks: processes with a gloo group, each running one function."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE_SECONDS = 90.0
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"])


def together(path: Path, world_size: int, function: str, **options: Any) -> list[Any]:
    """What `function`, a "module:name", returned on each rank, by rank. Its arguments are the rank and `options`."""
    pipes = [FORKS.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        FORKS.Process(target=_be, args=(rank, world_size, str(path / "store"), function, options, told))
        for rank, (_, told) in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        found = []
        for rank, (hear, told) in enumerate(pipes):
            told.close()
            assert hear.poll(PATIENCE_SECONDS), f"rank {rank} says nothing"
            try:
                found.append(hear.recv())
            except EOFError:
                raise AssertionError(f"rank {rank} failed: its traceback is in the output") from None
        return found
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _be(rank: int, world_size: int, store: str, function: str, options: dict[str, Any], told: Connection) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in any process that does not come from a fork server
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=PATIENCE_SECONDS)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=timeout
    )
    module, _, name = function.partition(":")
    told.send(getattr(importlib.import_module(module), name)(rank, **options))
    told.close()
    dist.barrier()
    dist.destroy_process_group()
