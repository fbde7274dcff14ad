"""`--compress`: a run that is hurt, killed and continued, with one codec and then another, ends as one that was not."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from ftrain.checkpoint.catalogue import find
from ftrain.checkpoint.tools.verify import verify
from ftrain.core.manifest import decode_index
from tests.launching.harness import Cluster
from tests.recovery import training
from tests.recovery.account import Job, committed, launch

WIDE = ("--width", 32)  # weights of more than a page


def codecs(checkpoint: Path) -> set[str]:
    """Of the packs of a checkpoint."""
    return {decode_index(path.read_bytes(), "").codec for path in checkpoint.glob("packs/*.index.json")}


def test_hurt_and_killed_run_with_compression_ends_as_an_unhurt_one_without(cluster: Cluster) -> None:
    parallel = "fsdp"
    unhurt, job = Job(cluster.path / "unhurt"), Job(cluster.path / "job")
    assert launch(cluster, unhurt, parallel, every="off", more=(*WIDE, "--pause", 0)).wait() == 0

    injury = {training.INJURIES: json.dumps([{"point": "forward", "rank": 1, "step": 7, "how": "SIGKILL"}])}
    flags = ("--compress", "blosc-zstd")
    first = launch(cluster, job, parallel, flags=flags, more=(*WIDE, "--pause", 0.1), environment=injury)
    committed(first, 8)  # after the injury
    first.process.send_signal(signal.SIGKILL)
    first.wait()
    assert cluster.nothing_left()
    assert job.injuries() == 1
    newest = max(job.commits())
    assert codecs([path for path in job.checkpoints() if job.done_at(path) == newest][-1]) >= {"blosc-zstd:3"}
    assert verify(find(f"{job.run_dir}@latest")).strange == ()

    second = launch(cluster, job, parallel, flags=("--compress", "zstd:9"), more=WIDE)
    assert second.wait() == 0, second.text
    assert f"from step {newest}" in second.text
    assert "zstd:9" in codecs(job.checkpoints()[-1])
    assert job.end() == unhurt.end()
    assert job.samples() == unhurt.samples()
