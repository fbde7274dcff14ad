"""A small chaos; `python -m tests.chaos` is the large one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.run import Chaos
from tests.launching.harness import clusters
from tests.recovery.account import Job, launch


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_run_that_is_hurt_at_random_ends_as_the_unhurt_one(tmp_path: Path, parallel: str) -> None:
    for cluster in clusters(tmp_path):
        chaos = Chaos(cluster, 7, 8, parallel, kinds=("kill a rank", "kill a rank, and another while it recovers"))
        chaos.run()
        unhurt = Job(cluster.path / "unhurt")
        reference = launch(
            cluster, unhurt, parallel, ranks=4, every="off", steps=chaos.steps, more=("--pause", 0, "--norm", "layer")
        )
        assert reference.wait() == 0, reference.text
        assert chaos.job.history() == unhurt.history(), chaos.told()
        assert chaos.job.end() == unhurt.end(), chaos.told()
        assert cluster.nothing_left()
