"""Train a byte-level GPT on the source text of the Python standard library.

    ftrain launch --nproc-per-node 2 examples/train_gpt.py

What ftrain needs of a training script is marked with `# ftrain`: six lines. The rest is ordinary PyTorch.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import ftrain


def corpus() -> np.ndarray:
    """All of the standard library's source as one array of bytes, cached in a file and mapped into memory."""
    library = Path(sysconfig.get_path("stdlib"))
    cache = Path(tempfile.gettempdir()) / f"ftrain-corpus-{os.getuid()}-{sysconfig.get_python_version()}.bin"
    if not cache.exists():
        files = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
        temporary = cache.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(b"\n".join(path.read_bytes() for path in files))
        temporary.replace(cache)  # whole or not at all: other ranks may be looking
    return np.memmap(cache, dtype=np.uint8, mode="r")


class Windows(Dataset[torch.Tensor]):
    """Windows of `context + 1` bytes, one after the other: the first part to train on, the last for validation."""

    def __init__(self, text: np.ndarray, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.context
        return torch.from_numpy(self.text[start : start + self.context + 1].astype(np.int64))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout * self.training, is_causal=True
        )
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of each next byte; `window` is [batch, context + 1]."""
        tokens, targets = window[:, :-1], window[:, 1:]
        x = self.drop(self.token(tokens) + self.position.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def validate(model: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        loss = torch.stack([model(batch) for batch in batches]).mean()
    model.train()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """One SHA-256 over all parameters and optimizer state, equal only if every bit is."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        for tensor in (parameter, *optimizer.state[parameter].values()):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found.update(whole.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="windows on each rank")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--validate-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--digest", type=Path, help="write the digest of the final state here")
    args = parser.parse_args()

    run = ftrain.join()  # ftrain: makes the default process group too
    torch.manual_seed(args.seed)  # the same parameters on all ranks
    torch.use_deterministic_algorithms(True)
    model: nn.Module = GPT(args.layers, args.width, args.heads, args.context, args.dropout).to(run.device)
    if args.parallel == "fsdp":
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)

    def schedule(step: int) -> float:
        rising = min(1.0, (step + 1) / args.warmup)
        return rising * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / args.steps))))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    torch.manual_seed(args.seed + 1 + run.rank)  # other dropout on each rank

    text = corpus()
    cut = len(text) * 99 // 100
    training, validation = Windows(text[:cut], args.context), Windows(text[cut:], args.context)
    sampler = DistributedSampler(training, run.world_size, run.rank, seed=args.seed)
    batches = run.batches(DataLoader(training, args.batch, sampler=sampler, drop_last=True))  # ftrain
    held_out = [torch.stack([validation[i] for i in range(run.rank * 8, run.rank * 8 + 8)]).to(run.device)]

    run.track(model=model, optimizer=optimizer, scheduler=scheduler)  # ftrain
    for step in run.steps(args.steps):  # ftrain: restores the newest commit, yields what is still to do
        with step:  # ftrain
            loss = model(next(batches).to(run.device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step.log(loss=loss, lr=scheduler.get_last_lr()[0])  # ftrain
            if (step.number + 1) % args.validate_every == 0:
                step.log(validation=validate(model, held_out))

    found = digest(model, optimizer)  # a collective under FSDP: all ranks take part
    if run.rank == 0:
        print(f"digest {found}")
        if args.digest is not None:
            args.digest.write_text(found)


if __name__ == "__main__":
    main()
