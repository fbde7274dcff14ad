"""Runs in an object store: the same commands, by URL."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.storage.servers import S3Server
from tests.tools.runs import ckpt, make_run_at


def test_a_run_in_an_object_store_is_looked_at_compared_forked_and_pruned(s3: S3Server, tmp_path: Path) -> None:
    run, new = s3.new_url(), s3.new_url()
    make_run_at(run, {step: {"model": {"w": torch.full((3, 4), float(step))}} for step in (5, 10, 15)})
    assert [row["step"] for row in ckpt("ls", run, "--json").json["commits"]] == [5, 10, 15]
    assert ckpt("verify", run).code == 0
    assert ckpt("show", run, "--anomalies").code == 0
    found = ckpt("diff", f"{run}@5", f"{run}@latest", "--json")
    assert (found.code, found.json["tensors"][0]["max_change"]) == (1, 10.0)
    assert ckpt("export", f"{run}@10", tmp_path / "out.pt", "--name", "model").code == 0
    assert torch.equal(torch.load(tmp_path / "out.pt")["w"], torch.full((3, 4), 10.0))
    assert ckpt("fork", f"{run}@5", new, "--weights-only").code == 0
    removed = ckpt("prune", run, "--keep", "1", "--json").json["removed"]
    assert [path.split("/")[1] for path in removed] == ["step-000000000010"]
    assert [row["step"] for row in ckpt("ls", run, "--json").json["commits"]] == [5, 15]
    assert ckpt("verify", new).code == 0
