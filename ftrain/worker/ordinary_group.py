"""Ordinary process groups, made so that making them can be given up: gloo for CPU tensors, NCCL for CUDA tensors."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, Store
from torch.distributed.distributed_c10d import GroupName

from ftrain.worker import gloo_sockets
from ftrain.worker.local_group import LocalGroup
from ftrain.worker.patience import wait_for

# For the connections alone, made when all members are known to be there: it bounds how long a thread that was left
# behind while it connected stays.
CONNECT_TIMEOUT = timedelta(minutes=2)
CHECK_SECONDS = 0.05

T = TypeVar("T")
Check = Callable[[], None]  # raises when what is under way has to be given up


def ordinary_group(
    store: Store, rank: int, size: int, timeout: timedelta, name: str, loopback: bool, check: Check = lambda: None
) -> ProcessGroup:
    """A plain ProcessGroup whose members meet in the store. `check` is called while it waits there, and may raise."""
    patient = PatientStore(store, timeout, check, ranks=size)
    patient.set(f"arrived/{rank}", "")
    patient.wait([f"arrived/{one}" for one in range(size)])
    group = ProcessGroup(store, rank, size)
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in torch's stub
    options._timeout = min(timeout, CONNECT_TIMEOUT)
    options._devices = gloo_sockets.devices(loopback)
    gloo = ProcessGroupGloo(PrefixStore("cpu", patient), rank, size, options)
    gloo.set_timeout(timeout)
    group._set_default_backend(ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)
    if torch.cuda.is_available() and dist.is_nccl_available():
        # Who is lost is found out by the agents: torch would end this process where a peer's connection breaks.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        nccl_options = dist.ProcessGroupNCCL.Options()
        nccl_options._timeout = timeout
        nccl = dist.ProcessGroupNCCL(PrefixStore("cuda", store), rank, size, nccl_options)
        group._set_default_backend(ProcessGroup.BackendType.NCCL)
        group._register_backend(torch.device("cuda"), ProcessGroup.BackendType.NCCL, nccl)
    group._set_group_name(GroupName(f"{name}-inner"))
    return group


def nccl_of(group: ProcessGroup | LocalGroup) -> Any | None:
    """The group's NCCL backend, None where it has none."""
    if isinstance(group, LocalGroup) or not (torch.cuda.is_available() and dist.is_nccl_available()):
        return None
    try:
        backend = group._get_backend(torch.device("cuda"))
    except RuntimeError:
        return None
    return backend if isinstance(backend, dist.ProcessGroupNCCL) else None


def beside(make: Callable[[], T], check: Check) -> T:
    """What `make` returns or raises, made by a thread of its own, which is left behind when `check` raises.

    A connection that nobody answers cannot be woken: gloo waits for it without a socket.
    """
    made: list[T] = []
    failed: list[BaseException] = []
    ended = threading.Event()
    given_up = threading.Event()

    def run() -> None:
        try:
            made.append(make())
        except BaseException as error:  # noqa: BLE001  # raised below, in the thread that asked
            if not given_up.is_set():
                failed.append(error)
        ended.set()

    threading.Thread(target=run, name="ftrain-connect", daemon=True).start()
    try:
        while not ended.wait(CHECK_SECONDS):
            check()
        check()
        if failed:
            raise failed.pop()
        return made.pop()
    finally:
        # An error has its frames, and these have the list: connections in them would stay until garbage is collected.
        given_up.set()
        failed.clear()


class PatientStore(Store):
    """A store that waits by asking again and again, so that waiting can be given up and never blocks other users.

    Raises what `check` raises, and `DistStoreError` after the timeout. As many `ranks` as it says ask at once.
    """

    def __init__(self, store: Store, timeout: timedelta, check: Check, ranks: int) -> None:
        super().__init__()
        self._store = store
        self._timeout = timeout
        self._check = check
        self._ranks = ranks

    def wait(self, keys: Sequence[str], _timeout: timedelta | None = None) -> None:
        deadline = time.monotonic() + self._timeout.total_seconds()

        def look() -> None:
            self._check()
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"waited {self._timeout} for peers that did not come ({keys[0]}, …)")

        wait_for(self._store, keys, look, self._ranks)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._store.get(key)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        self.wait(keys)
        return self._store.multi_get(list(keys))

    def set(self, key: str, value: Any) -> None:
        self._store.set(key, value)

    def add(self, key: str, value: int) -> int:
        return self._store.add(key, value)

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)
