"""`save`: a checkpoint of any state at any path, with or without a launcher."""

from __future__ import annotations

from array import array
from pathlib import Path

import torch

from ftrain.checkpoint.async_save import async_save
from ftrain.checkpoint.peers import peers, together
from ftrain.checkpoint.staging.host import in_host_memory
from ftrain.checkpoint.staging.look import host_addresses
from ftrain.checkpoint.writing.agreement import Plans
from ftrain.checkpoint.writing.job import Jobs, State
from ftrain.checkpoint.writing.target import Target
from ftrain.storage.base import Effort

EFFORT = Effort(threads=2)  # nothing else is to be done meanwhile
_plans = Plans()
_jobs = Jobs()


def save(
    path: str | Path, state: State, *, step: int = 0, keep: str | None = None, compress: str | None = None
) -> None:
    """Save a state durably: once this returned, the checkpoint at `path` is committed.

    `state` holds modules, optimizers and other objects with `state_dict` and `load_state_dict`, (nested) dicts and
    lists of tensors and DTensors, and plain data. Where torch.distributed is initialized, all ranks call together; a
    tensor that several ranks name is taken to be the same on all of them, and is written once. With `keep`, `path` is a
    run's directory, and the checkpoint is `path/kept/NAME`: it stays, whatever the run retires. With `compress`, which
    is "zstd", "blosc-zstd" or "blosc-lz4", also with a level ("zstd:9") and the same on all ranks, tensors are
    compressed. Raises `UsageError` for a state that cannot be saved, naming the key, `AlreadyExists` where `path` holds
    a checkpoint, and `StorageError` where storage fails: then nothing is committed, on any rank.
    """
    if torch.cuda.is_available():
        # What is on a device comes through pinned memory.
        async_save(path, state, step=step, keep=keep, compress=compress).result()
        return
    group = peers()
    with together(group, f"saving {path}"):
        target, job = Target(path, step, keep, compress), _jobs.job(state)
    agreed = _plans.agree(job.specs, group)
    held = job.written(agreed.pack)
    addresses = host_addresses(held)
    if addresses is None:
        held = [in_host_memory(tensor) for tensor in held]
        addresses = array("Q", map(torch.Tensor.data_ptr, held))
    found = addresses
    target.commit(agreed, group, lambda: found, job.plain, EFFORT)
