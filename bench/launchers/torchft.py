"""torchft: every rank is a replica group under a torchrun of its own, which starts it again; a lighthouse counts them.

That is how torchft's README and its TorchX component run it.
"""

from __future__ import annotations

import sys

from launchers.job import SCRIPTS, Job, free_port
from launchers.torchrun import TORCHRUN

LIGHTHOUSE = [sys.executable, str(SCRIPTS / "lighthouse.py")]


class Torchft(Job):
    """The others go on while one is away, with other gradients than an unhurt run's."""

    name = "torchft"
    package = "torchft"
    parallels = ("ddp",)
    branch = "torchft"
    repeatable = False

    @property
    def ranks_min(self) -> int:
        return 1

    def prepare(self) -> None:
        super().prepare()
        self.lighthouse_port = free_port()
        self.helpers.append(
            self.popen(
                [*LIGHTHOUSE, str(self.lighthouse_port), str(self.ranks_min)], self.path / "output-lighthouse.txt"
            )
        )

    def commands(self) -> list[list[str]]:
        own = ["--nnodes", "1", "--nproc-per-node", "1", "--max-restarts", "100", "--master-port"]
        return [[*TORCHRUN, *own, str(free_port())] for _ in range(self.world_size)]

    def environment(self, index: int) -> dict[str, str]:
        return {
            "TORCHFT_LIGHTHOUSE": f"http://localhost:{self.lighthouse_port}",
            "REPLICA_GROUP_ID": str(index),
            "NUM_REPLICA_GROUPS": str(self.world_size),
        }

    def script_flags(self) -> list[str]:
        return [*super().script_flags(), "--ranks-min", str(self.ranks_min)]

    def stages(self, killed_at: float) -> dict[str, float]:
        ranks = [self.lines(rank, kind="fewer") for rank in range(self.world_size - 1)]
        after = [[line.at - killed_at for line in lines if line.at > killed_at] for lines in ranks]
        return {"a new step on the fewer ranks left": max(seconds[0] for seconds in after)} if all(after) else {}


class TorchftWhole(Torchft):
    """No step is done until all ranks are back."""

    name = "torchft-whole"
    repeatable = True

    @property
    def ranks_min(self) -> int:
        return self.world_size
