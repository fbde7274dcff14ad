"""What is trained: a small model on every rank, with steps that depend on nothing but their number.

Its last layer is frozen: commits refer to it in the packs of earlier ones, which must stay when those are retired.
After each step rank 0 writes what the state then is to DIGESTS, which lies on another disk: `step sha256`.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ftrain

WIDTH = 128
STEPS_PER_COMMIT = 5


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model[-1].requires_grad_(False)
    return model, torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=1e-3)


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of every byte that training goes on from."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
        for _, value in sorted(optimizer.state.get(parameter, {}).items()):
            found.update(value.numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--digests", type=Path, required=True)
    parser.add_argument("--pause", type=float, default=0.0, help="after each step, in seconds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = ftrain.join()
    model, optimizer = build()
    parallel = DistributedDataParallel(model)
    run.track(model=model, optimizer=optimizer)
    with args.digests.open("a", buffering=1) as digests:
        for step in run.steps(args.steps):
            with step:
                torch.manual_seed(1000 * step.number + run.rank)
                optimizer.zero_grad()
                parallel(torch.randn(8, WIDTH)).square().mean().backward()
                optimizer.step()
                if run.rank == 0:
                    digests.write(f"{step.number + 1} {digest(model, optimizer)}\n")
            time.sleep(args.pause)


if __name__ == "__main__":
    main()
