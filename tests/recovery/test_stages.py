"""Under real launchers: ranks that hold different parts of a model, and a run that begins with another's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ftrain
from tests.launching.harness import Cluster

STEPS = 6

# Two stages without a pipeline between them: what matters is that each rank has names that the other has not.
SCRIPT = """
    import json, os, signal, sys
    from pathlib import Path
    import torch, torch.distributed as dist, ftrain

    base, out, steps, stages, hurt = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]
    run = ftrain.join()
    layers = [f"layer{n}" for n in range(4) if stages == 1 or n // 2 == run.rank]
    torch.manual_seed(run.rank)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in layers})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run.track(model=model, optimizer=optimizer)
    report = ftrain.load(base, {"model": model}, rename={"trunk": "model"})
    out.joinpath(f"loaded-{os.getpid()}").write_text(json.dumps([run.rank, run.restarted, *report.loaded]))
    for step in run.steps(steps):
        with step:
            loss = sum(model[name](torch.full((2, 3), 1.0 + step)).square().mean() for name in layers)
            shared = loss.detach().clone()
            dist.all_reduce(shared)
            (loss * 0.1).backward()
            mark = out / "hurt"
            if hurt and (int(step), run.rank) == (4, 1) and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            optimizer.zero_grad()
"""


def model_of(seed: int) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({f"layer{n}": nn.Linear(3, 3) for n in range(4)})


def trained(base: Path, steps: int) -> dict[str, Any]:
    """What the runs below are to come to."""
    model = model_of(0)
    ftrain.load(base, {"trunk": model})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        loss = sum(layer(torch.full((2, 3), 1.0 + step)).square().mean() for layer in model.values())
        (loss * 0.1).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def last_state(run_dir: Path) -> tuple[int, dict[str, Any]]:
    model = model_of(1)
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    return ftrain.load(run_dir, state).step, state


def tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = dict(state["model"].state_dict())
    for key, one in state["model"].named_parameters():
        found |= {f"{key}.{name}": tensor for name, tensor in state["optimizer"].state[one].items()}
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Weights of another run, under another name, with more beside them."""
    ftrain.save(tmp_path / "base", {"trunk": model_of(5), "more": {"a": torch.ones(2)}}, step=1000)
    return tmp_path / "base"


def launch(cluster: Cluster, base: Path, steps: int, *, ranks: int, stages: int, hurt: bool = False) -> str:
    script = cluster.script(SCRIPT)
    out = cluster.path / "out"
    out.mkdir(exist_ok=True)
    more = ["hurt"] if hurt else []
    flags = ("--nproc-per-node", ranks, "--run-dir", cluster.path / "run", "--checkpoint-every", 3)
    launcher = cluster.launch(*flags, script, base, out, steps, stages, *more)
    assert launcher.wait() == 0, launcher.text
    return launcher.text


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], one) for key, one in expected.items())


def test_stages_that_began_with_anothers_weights_are_hurt_and_resumed_and_cut_anew(
    cluster: Cluster, base: Path
) -> None:
    """A rank that is forked anew loads the weights by itself, while the others go on."""
    launch(cluster, base, STEPS, ranks=2, stages=2, hurt=True)
    loads = [json.loads(one.read_text()) for one in (cluster.path / "out").glob("loaded-*")]
    assert sorted((rank, restarted) for rank, restarted, *_ in loads) == [(0, False), (1, False), (1, True)]
    assert {len(keys) for _, _, *keys in loads} == {4}
    step, state = last_state(cluster.path / "run")
    assert step == STEPS
    check(tensors(state), tensors(trained(base, STEPS)))

    launch(cluster, base, STEPS + 2, ranks=2, stages=2)  # from storage, each stage its own part
    step, state = last_state(cluster.path / "run")
    assert step == STEPS + 2
    check(tensors(state), tensors(trained(base, STEPS + 2)))

    launch(cluster, base, STEPS + 4, ranks=1, stages=1)  # one rank takes over both stages
    step, state = last_state(cluster.path / "run")
    assert step == STEPS + 4
    check(tensors(state), tensors(trained(base, STEPS + 4)))
