"""What `bench/step.py` runs: steps with nothing in them, the first half timed and the second half profiled.

Leaves the seconds of a step in RECORDS/seconds.json and the profile in RECORDS/profile.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import time
from pathlib import Path

import torch
from small_gpt import LEARNING_RATE, SmallGPT

import ftrain

WARMUP = 200  # steps that are neither timed nor profiled


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="of each half")
    parser.add_argument("--layers", type=int, required=True)
    args = parser.parse_args()
    run = ftrain.join()
    model = SmallGPT(args.layers, 512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    run.track(model=model, optimizer=optimizer)
    profile, timed = cProfile.Profile(), WARMUP + args.steps
    began = 0.0
    for step in run.steps(timed + args.steps):
        if step.number == WARMUP:
            began = time.perf_counter()
        elif step.number == timed:
            (args.records / "seconds.json").write_text(json.dumps((time.perf_counter() - began) / args.steps))
            profile.enable()
        with step:
            if step.number == 0:  # so that there is the optimizer's state
                model(torch.zeros(1, 9, dtype=torch.long)).backward()
                optimizer.step()
    profile.disable()
    profile.dump_stats(args.records / "profile")


if __name__ == "__main__":
    main()
