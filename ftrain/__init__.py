"""ftrain: fault-tolerant training for PyTorch. The public names, nothing else; torch is imported when one is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ftrain.errors import FtrainError, Preempted

if TYPE_CHECKING:
    from ftrain.checkpoint.async_save import Saving, async_save
    from ftrain.checkpoint.load import load
    from ftrain.checkpoint.loaded import Loaded
    from ftrain.checkpoint.save import save
    from ftrain.worker import Run, Step, join

__version__ = "0.1.0"
__all__ = [
    "FtrainError",
    "Loaded",
    "Preempted",
    "Run",
    "Saving",
    "Step",
    "__version__",
    "async_save",
    "join",
    "load",
    "save",
]

_MODULES = {
    "Loaded": "ftrain.checkpoint.loaded",
    "Run": "ftrain.worker",
    "Saving": "ftrain.checkpoint.async_save",
    "Step": "ftrain.worker",
    "async_save": "ftrain.checkpoint.async_save",
    "join": "ftrain.worker",
    "load": "ftrain.checkpoint.load",
    "save": "ftrain.checkpoint.save",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)  # from now on not asked again
        return found
    raise AttributeError(f"module 'ftrain' has no attribute {name!r}")
