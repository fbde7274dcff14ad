"""Counts its steps for the cluster tests: counting.py DIRECTORY STEPS SECONDS LOADERS.

A step of the first start takes SECONDS, so that there is time to interrupt it. Each start adds the first step that it
did to starts.RANK, each step adds itself to steps.RANK. LOADERS is how many processes load the data.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

import ftrain

directory, steps, seconds, loaders = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])

run = ftrain.join()
rank, world_size = dist.get_rank(), dist.get_world_size()
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
batches = run.batches(DataLoader(TensorDataset(torch.arange(float(steps))), num_workers=loaders))
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
        assert next(batches)[0].item() == done
        one = torch.ones(()) / world_size
        dist.all_reduce(one)
        with torch.no_grad():
            model.weight += one
        if first_start:
            time.sleep(seconds)
        with (directory / f"steps.{rank}").open("a") as file:
            file.write(f"{done}\n")

(directory / f"total.{rank}").write_text(f"{model.weight.item()}\n")
