"""What restarts a training job, one file for each; `bench/recovery.py` kills ranks under them."""

from __future__ import annotations

from launchers.ftrain import Ftrain
from launchers.job import Job, NotBackError, Recovery
from launchers.nvidia import Nvidia
from launchers.torchft import Torchft, TorchftWhole
from launchers.torchrun import Torchrun

LAUNCHERS: dict[str, type[Job]] = {job.name: job for job in (Torchrun, Nvidia, Torchft, TorchftWhole, Ftrain)}

__all__ = ["LAUNCHERS", "Job", "NotBackError", "Recovery"]
