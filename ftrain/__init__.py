"""ftrain: fault-tolerant training for PyTorch. The public names, nothing else; torch is imported when one is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftrain.errors import FtrainError, Preempted

if TYPE_CHECKING:
    from ftrain.worker import Run, Step, join

__version__ = "0.1.0"
__all__ = ["FtrainError", "Preempted", "Run", "Step", "__version__", "join"]


def __getattr__(name: str) -> Any:
    if name in ("Run", "Step", "join"):
        import ftrain.worker

        return getattr(ftrain.worker, name)
    raise AttributeError(f"module 'ftrain' has no attribute {name!r}")
