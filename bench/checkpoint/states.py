"""What is saved: a GPT with the state of its AdamW, or very many small tensors. The same bytes for every subject."""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import torch

State = dict[str, torch.Tensor]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GPT_LAYERS = 12
GPT_WIDTHS = {"fp32": 896, "bf16": 1344}  # either way about 2 GB with both moments
VOCABULARY = 50304
CONTEXT = 1024
MANY_TENSORS = 20_000
MANY_SHAPE = (64, 64)  # 16 KiB of float32
PATTERN_ELEMENTS = (8 << 20) + 1  # odd, so that equal tensors in a row do not get equal contents


@dataclass(frozen=True)
class Workload:
    """One state on `ranks` ranks: `kind` is "gpt" or "many", `scale` 1.0 the full size."""

    kind: str
    dtype: str
    ranks: int
    scale: float

    def __str__(self) -> str:
        scale = "" if self.scale == 1.0 else f", scale {self.scale:g}"
        return f"{self.kind} {self.dtype}, {self.ranks} rank{'s' if self.ranks > 1 else ''}{scale}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors of the whole state by name."""
        return many_shapes(self.scale) if self.kind == "many" else gpt_shapes(self.dtype, self.scale)

    def shapes_of(self, rank: int) -> dict[str, tuple[int, ...]]:
        """What `rank` holds, under names that only this rank has: that is what every peer can save.

        Of "gpt" each rank has its rows of every tensor, as FSDP cuts them; of "many" every `ranks`-th tensor.
        """
        whole = self.shapes()
        if self.ranks == 1:
            return whole
        if self.kind == "many":
            return {f"rank{rank}.{name}": whole[name] for name in sorted(whole)[rank :: self.ranks]}
        return {f"rank{rank}.{name}": rows_of(shape, rank, self.ranks) for name, shape in whole.items()}

    def build(self, rank: int) -> State:
        """The tensors of `rank`, filled, so that every page of them is there."""
        dtype = DTYPES[self.dtype]
        pattern = make_pattern(dtype)
        state = {name: torch.empty(shape, dtype=dtype) for name, shape in self.shapes_of(rank).items()}
        at = rank * 1009
        for tensor in state.values():
            at = fill(tensor, pattern, at)
        return state

    def bytes_of(self, rank: int) -> int:
        return sum(math.prod(shape) for shape in self.shapes_of(rank).values()) * DTYPES[self.dtype].itemsize


def gpt_shapes(dtype: str, scale: float) -> dict[str, tuple[int, ...]]:
    """A GPT-2 of 12 layers with both moments of AdamW: 444 tensors; `scale` shrinks the width and the vocabulary."""
    shrink = math.sqrt(scale)
    width = max(8, round(GPT_WIDTHS[dtype] * shrink / 8) * 8)
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (max(64, round(VOCABULARY * shrink)), width),
        "wpe.weight": (max(16, round(CONTEXT * shrink)), width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for layer in range(GPT_LAYERS):
        for name, rows, columns in (("qkv", 3, 1), ("out", 1, 1), ("up", 4, 1), ("down", 1, 4)):
            shapes[f"h.{layer}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"h.{layer}.{name}.bias"] = (rows * width,)
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{layer}.{name}.weight"] = (width,)
            shapes[f"h.{layer}.{name}.bias"] = (width,)
    parts = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    return {f"{part}.{name}": shape for part in parts for name, shape in shapes.items()}


def many_shapes(scale: float) -> dict[str, tuple[int, ...]]:
    return {f"expert.{index}.weight": MANY_SHAPE for index in range(max(16, round(MANY_TENSORS * scale)))}


def rows_of(shape: tuple[int, ...], rank: int, ranks: int) -> tuple[int, ...]:
    """The shape of a rank's part of dimension 0, cut as torch.chunk does."""
    size = -(-shape[0] // ranks)
    return (max(0, min(size, shape[0] - rank * size)), *shape[1:])


def make_pattern(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(PATTERN_ELEMENTS, generator=torch.Generator().manual_seed(1)).to(dtype)


def fill(tensor: torch.Tensor, pattern: torch.Tensor, at: int) -> int:
    """Fill a tensor from the repeated pattern, beginning at element `at`; where the next one begins.

    Copying random numbers takes a tenth of the time that making them takes.
    """
    flat = tensor.view(-1)
    done = 0
    while done < flat.numel():
        count = min(flat.numel() - done, pattern.numel() - at)
        flat[done : done + count].copy_(pattern[at : at + count])
        done += count
        at = (at + count) % pattern.numel()
    return at


def clear(state: State) -> None:
    """Zero every byte, so that only a real load brings the digest back."""
    for tensor in state.values():
        tensor.zero_()


def digest(state: State) -> int:
    """A checksum over names, and all bytes in the order of the names."""
    found = 0
    for name in sorted(state):
        found = zlib.crc32(memoryview_of(state[name]), zlib.crc32(name.encode(), found))
    return found


def memoryview_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    data: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(data)
