"""A run that turns to NaN at a known step: the commands that find the step and the tensor, and go on from before it.

docs/tools.md tells it to people, with what the commands say.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ftrain.checkpoint.catalogue import metrics_by_step
from ftrain.storage import PosixStorage
from tests.launching.harness import Cluster, clusters
from tests.tools.runs import ckpt

SICK_STEP = 12  # finished steps before the one that makes `model.scale` infinite

SCRIPT = f"""
import sys
import time

import torch
import ftrain


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(8))
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))

    def forward(self, x):
        y = self.layers(x * self.scale)
        with torch.no_grad():
            self.scale.mul_(0.9).add_(0.1 / x.std(0))  # for the next batch
        return y


def batch(number):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(number))
    if number == {SICK_STEP} and "--skip-broken" not in sys.argv:
        x[:, 5] = 0.0  # a sensor that was off
    return x


run = ftrain.join()
torch.manual_seed(0)
model = Model()
optim = torch.optim.AdamW(model.parameters(), lr=0.02 if "--lower" in sys.argv else 0.01)
run.track(model=model, optim=optim)
for step in run.steps(20):
    with step:
        x = batch(step.number)
        time.sleep(0.15)  # longer than a commit takes, as real steps
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
        step.log(loss=loss, lr=optim.param_groups[0]["lr"])
    if "--watch" in sys.argv:
        ftrain.save(f"watched/step-{{step.number + 1}}", {{"model": model}}, step=step.number + 1)
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    yield from clusters(tmp_path)


def test_the_step_and_the_tensor_are_found_and_the_run_goes_on_from_before(cluster: Cluster) -> None:
    script = cluster.script(SCRIPT, "train.py")
    run, again, fixed = (cluster.path / name for name in ("run", "again", "fixed"))

    def launch(directory: Path, *flags: str, script_flags: tuple[str, ...] = ()) -> None:
        done = cluster.launch("--run-dir", directory, *flags, script, *script_flags)
        assert done.wait() == 0, done.text

    launch(run, "--checkpoint-every", "5", "--keep", "10")
    found = ckpt("show", run, "--anomalies", "--json")
    assert found.code == 1
    clean = found.json["clean_until"]  # a commit that was still under way may have let a step pass
    assert clean in (5, 10)
    assert found.json["metrics"][0]["step"] == SICK_STEP + 1, "the loss of the step after"
    assert min(one["step"] for one in found.json["tensors"]) > SICK_STEP

    # From the last clean commit the same happens again, bit by bit, and now every step is looked at.
    assert ckpt("fork", f"{run}@{clean}", again).code == 0
    launch(again, "--checkpoint-every", "off", script_flags=("--watch",))
    watched = cluster.path / "watched"
    closer = ckpt("show", watched, "--anomalies", "--json").json
    assert closer["looked_at"] == list(range(clean + 1, 21))
    assert closer["clean_until"] == SICK_STEP
    first = [one for one in closer["tensors"] if one["step"] == SICK_STEP + 1]
    assert [(one["where"].partition("/")[2] or one["where"], one["kind"]) for one in first] == [("model.scale", "inf")]
    compared = ckpt("diff", f"{watched}@{SICK_STEP}", f"{watched}@{SICK_STEP + 1}", "--json").json
    assert (compared["tensors"][0]["key"], compared["tensors"][0]["sick_at"]) == ("model.scale", [5])

    # The data is mended, and the run goes on from before.
    assert ckpt("fork", f"{run}@{clean}", fixed, "--own-options").code == 0
    launch(fixed, "--checkpoint-every", "5", "--keep", "2", script_flags=("--skip-broken", "--lower"))
    assert ckpt("show", fixed, "--anomalies").code == 0
    steps = metrics_by_step(PosixStorage(fixed))
    assert (steps[0][0], steps[0][1]["lr"]) == (clean, 0.02)
    assert ckpt("ls", fixed, "--json").json["commits"][-1]["step"] == 20
    (forked,) = [row for row in ckpt("ls", run, "--json").json["commits"] if row["step"] == clean]
    assert len(forked["pins"]) == 2
