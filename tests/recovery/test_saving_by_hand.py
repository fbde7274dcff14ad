"""`ftrain.save` and `async_save` in the loop of a launched run: also after a rank was replaced beside them."""

from __future__ import annotations

from pathlib import Path

import torch

import ftrain
from tests.launching.harness import Cluster

STEPS = 8
EVERY = 2

SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    import torch, ftrain

    out, mark = Path(sys.argv[1]), Path(sys.argv[1]) / "hurt"
    run = ftrain.join()
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.track(model=model, optimizer=optimizer)
    for step in run.steps(8):
        with step:
            model(torch.full((1, 3), 1.0 + step)).square().mean().backward()
            if (int(step), run.rank) == (4, 1) and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            optimizer.zero_grad()
        if step.done and step.number % 2 == 1:
            ftrain.save(out / f"by-hand-{step.number}", {"model": model, "done": step.number})
            ftrain.async_save(out / f"beside-{step.number}", {"model": model, "done": step.number}).result()
"""


def test_saves_in_the_loop_go_on_after_a_rank_was_replaced(cluster: Cluster) -> None:
    out = cluster.path / "out"
    out.mkdir()
    launcher = cluster.launch("--nproc-per-node", 2, "--run-dir", cluster.path / "run", cluster.script(SCRIPT), out)
    assert launcher.wait() == 0, launcher.text
    assert (out / "hurt").exists()
    weights = {}
    for kind in ("by-hand", "beside"):
        for step in range(1, STEPS, EVERY):
            state = {"model": torch.nn.Linear(3, 3), "done": 0}
            ftrain.load(Path(out / f"{kind}-{step}"), state)
            assert state["done"] == step
            weights[kind, step] = state["model"].weight  # type: ignore[union-attr]
    for step in range(1, STEPS, EVERY):
        assert torch.equal(weights["by-hand", step], weights["beside", step])
