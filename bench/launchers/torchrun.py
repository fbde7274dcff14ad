"""torchrun: every rank starts again and loads the newest checkpoint."""

from __future__ import annotations

import sys

from launchers.job import Job, endpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


class Torchrun(Job):
    name = "torchrun"
    branch = "torchrun"

    def commands(self) -> list[list[str]]:
        own = ["--rdzv-backend", "c10d", "--rdzv-id", "bench", "--rdzv-endpoint", endpoint(), "--max-restarts", "100"]
        return [[*TORCHRUN, *self.size_flags(), *own] for _ in range(self.args.nodes)]
