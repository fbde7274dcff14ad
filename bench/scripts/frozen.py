"""A fine-tune: most weights are frozen, the rest is trained. For `bench/frozen.py`."""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import ftrain

LAYERS = 20

parser = argparse.ArgumentParser()
parser.add_argument("--mebibytes", type=int, required=True, help="of weights")
parser.add_argument("--trained", type=int, default=2, help=f"of {LAYERS} layers")
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--pause", type=float, default=0.02)
args = parser.parse_args()

run = ftrain.join()
torch.manual_seed(0)
width = int((args.mebibytes * (1 << 20) / 4 / LAYERS) ** 0.5)
model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS))).requires_grad_(False)
model[LAYERS - args.trained :].requires_grad_(True)
# SGD: the optimizer has no state, so that what is frozen is what its share of the weights says.
optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-2)
run.track(model=model, optimizer=optimizer)
for step in run.steps(args.steps):
    with step:
        loss = model(torch.randn(2, width)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(args.pause)
