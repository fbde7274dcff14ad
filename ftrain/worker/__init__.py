"""Inside the training process: join a run, track its state, go through its steps."""

from __future__ import annotations

from ftrain.worker.run import Run, join
from ftrain.worker.steps import Step, Steps

__all__ = ["Run", "Step", "Steps", "join"]
