"""A training script for the cluster tests, whose state is the number of its steps: counting.py DIRECTORY STEPS SECONDS.

A step of the first start takes SECONDS, so that there is time to interrupt it. Each start adds the first step that it
did to starts.RANK, each step adds itself to steps.RANK.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import ftrain

directory, steps, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

run = ftrain.join()
rank, world_size = dist.get_rank(), dist.get_world_size()
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
run.track(model=model)
starts = directory / f"starts.{rank}"
first_start = not starts.exists()

begun = False
for step in run.steps(steps):
    with step:
        done = round(model.weight.item())
        if not begun:
            with starts.open("a") as file:
                file.write(f"{done}\n")
            begun = True
        one = torch.ones(()) / world_size
        dist.all_reduce(one)
        with torch.no_grad():
            model.weight += one
        if first_start:
            time.sleep(seconds)
        with (directory / f"steps.{rank}").open("a") as file:
            file.write(f"{done}\n")

(directory / f"total.{rank}").write_text(f"{model.weight.item()}\n")
