"""Keeps the groups that a script destroys until nobody else has them. Imported by the nursery, before any script.

DDP holds its group, so `destroy_process_group` is not the end of it: that comes with the module, whose destructor has
Python's lock. A gloo group waits there for a thread, which may be about to free the last collective, for which it wants
that lock: the rank hangs at its end (pytorch#56297). The lock is let go where a group ends with its Python object, so
that has to be the last to go.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
from collections import deque

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

KEPT_MAX = 16  # each has sockets and threads; what was destroyed so many ago has lost its module, too

_kept: deque[ProcessGroup] = deque(maxlen=KEPT_MAX)
_destroy = c10d.destroy_process_group


@functools.wraps(_destroy)
def _destroy_and_keep(group: ProcessGroup | None = None) -> None:
    whole = group is None or group == dist.GroupMember.WORLD
    leaving = list(c10d._world.pg_map) if whole else [group]
    _destroy(group)
    # Ours are exchanged below their modules, and destroyed by `process_group`.
    _kept.extend(one for one in leaving if type(one) is ProcessGroup)


def _leave() -> None:
    """The kernel closes the sockets: nothing waits for anything while Python ends."""
    for group in _kept:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


atexit.register(_leave)
c10d.destroy_process_group = dist.destroy_process_group = _destroy_and_keep
