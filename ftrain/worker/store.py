"""Hosts the store of one generation, in a process of its own that is forked from the nursery.

The store serves its clients from threads, which the nursery must not have, and a store inside rank 0 would die with it.
"""

from __future__ import annotations

import signal
import socket
from datetime import timedelta

from torch.distributed import TCPStore


def host(listen_fd: str, world_size: str) -> None:
    """Serve on the listening socket that the agent made, until killed."""
    # Slurm signals every process of a step, and the ranks still need the store to take their last snapshot.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    fd = int(listen_fd)
    with socket.socket(fileno=fd) as listening:
        address, port = listening.getsockname()[:2]
        listening.detach()
    store = TCPStore(
        address if address not in ("0.0.0.0", "::") else "localhost",
        port,
        int(world_size),
        is_master=True,
        timeout=timedelta(minutes=5),
        wait_for_workers=False,
        master_listen_fd=fd,
    )
    signal.pause()
    del store
