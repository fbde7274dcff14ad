"""The state of every random number generator that training draws from."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def capture() -> dict[str, object]:
    """Python's, numpy's (if it is imported), torch's for the CPU and for each CUDA device in use: plain data."""
    state: dict[str, object] = {"python": random.getstate(), "torch": _bytes(torch.get_rng_state())}
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, keys.tobytes(), int(position), int(has_gauss), float(cached))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = [_bytes(one) for one in torch.cuda.get_rng_state_all()]
    return state


def restore(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(_tensor(state["torch"]))
    if "numpy" in state:
        import numpy as np

        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        for device, one in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(_tensor(one), device)


def diverge(rank: int) -> None:
    """For a rank that has no state of its own to restore: move on from another rank's, each to its own place."""
    seed = (torch.initial_seed() + 0x9E3779B97F4A7C15 * (rank + 1)) % (1 << 63)
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % (1 << 32))


def of_generator(generator: torch.Generator) -> bytes:
    """The state of one generator of the user's own."""
    return _bytes(generator.get_state())


def set_generator(generator: torch.Generator, state: bytes) -> None:
    generator.set_state(_tensor(state))


def _bytes(state: torch.Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
