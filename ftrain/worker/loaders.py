"""The processes of a data loader: a SIGTERM to all processes of a job is not theirs to answer.

Clusters signal every process of a job. torch's loading processes die of it, their rank cannot go on without them, and
the step that was to be saved in the time of grace is lost. Only their own rank may end them, as torch itself does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from ftrain._native import leave_sigterm_to_parent


@dataclass(frozen=True)
class Sheltered:
    """A `worker_init_fn`: torch calls it in each process after it has set its own handlers. It can be pickled."""

    also: Callable[[int], object] | None

    def __call__(self, number: int) -> None:
        leave_sigterm_to_parent()
        if self.also is not None:
            self.also(number)


def shelter(loader: object) -> None:
    """Let the processes that this loader will start leave SIGTERM to this one. Does nothing to other loaders."""
    if isinstance(loader, DataLoader) and loader.num_workers and not isinstance(loader.worker_init_fn, Sheltered):
        given: Any = loader.worker_init_fn
        loader.worker_init_fn = Sheltered(given)
