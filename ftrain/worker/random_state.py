"""The state of every random number generator that training draws from."""

from __future__ import annotations

import ctypes
import random
import sys
from array import array
from typing import Any

import torch

_MT19937_BYTES = 625 * 4  # 624 words and the position among them
_numpy_seen: tuple[bytes, tuple[object, ...]] | None = None  # the generator's memory, and the state that it stood for


def capture() -> dict[str, object]:
    """Python's, numpy's (if it is imported), torch's for the CPU and for each CUDA device in use: plain data."""
    version, words, gauss = random.getstate()
    state: dict[str, object] = {
        "python": (version, array("I", words).tobytes(), gauss),
        "torch": _bytes(torch.get_rng_state()),
    }
    if "numpy" in sys.modules:
        state["numpy"] = _of_numpy(sys.modules["numpy"].random)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = [_bytes(one) for one in torch.cuda.get_rng_state_all()]
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(array("I", words)), gauss))
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


def _of_numpy(numpy_random: Any) -> tuple[object, ...]:
    """numpy takes its state out word by word, which is slow: what stands in memory as it stood is not asked again."""
    global _numpy_seen
    bits = numpy_random.get_bit_generator()
    memory = None
    if type(bits).__name__ == "MT19937":
        memory = ctypes.string_at(bits.ctypes.state_address, _MT19937_BYTES)
        # A normal number that is kept for the next call is not in that memory; keeping one draws, giving it away does
        # not.
        if _numpy_seen is not None and _numpy_seen[0] == memory and not _numpy_seen[1][3]:
            return _numpy_seen[1]
    name, keys, position, has_gauss, cached = numpy_random.get_state()
    state = (name, keys.tobytes(), int(position), int(has_gauss), float(cached))
    _numpy_seen = (memory, state) if memory is not None else None
    return state


def _bytes(state: torch.Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
