"""How fast tensors leave a GPU, what that costs the training, and how near it is to what the bus can do.

Beside DeviceCopies, which ftrain stages with: `.cpu()`, one pinned copy a tensor, and torch.distributed.checkpoint's
DefaultStager, kept between its turns. The limit is one pinned copy of a gigabyte, taken before and after each turn.
Each result's bytes are compared with the tensors once. Needs a CUDA GPU; exits with 69 where there is none.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from ftrain import _native
from ftrain.checkpoint.staging.device import DeviceCopies, DeviceTicket
from ftrain.core.layout import align

DEVICE = torch.device("cuda", 0)
LIMIT_BYTES = 1 << 30
COMPUTE_TO_COPY = 3.0  # a step computes for this many times as long as its copies take at the limit
State = dict[str, torch.Tensor]


def gpt(scale: float) -> State:
    """A GPT of 12 layers with both moments of AdamW: 2.4 GB in 444 tensors at scale 1."""
    width = max(16, int(1024 * scale**0.5) // 16 * 16)
    shapes = {"embedding": (50257, width), "positions": (1024, width), "norm.weight": (width,), "norm.bias": (width,)}
    for layer in range(12):
        for name, (rows, columns) in {"qkv": (3, 1), "out": (1, 1), "up": (4, 1), "down": (1, 4)}.items():
            shapes[f"{layer}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"{layer}.{name}.bias"] = (rows * width,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"{layer}.{name}"] = (width,)
    return {
        f"{kind}.{name}": torch.randn(shape, device=DEVICE)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
    }


def many(scale: float) -> State:
    """20,000 tensors of 16 KiB at scale 1."""
    return {f"{i}": torch.randn(4096, device=DEVICE) for i in range(max(1, int(20_000 * scale)))}


class Subject(ABC):
    """One way to bring a state to the host while the device computes on."""

    @abstractmethod
    def begin(self, state: State) -> None:
        """Start, and return as soon as the caller may go on computing without writing to the state."""

    @abstractmethod
    def before_write(self) -> None:
        """Return as soon as the caller may enqueue what writes to the state."""

    @abstractmethod
    def finish(self) -> State:
        """Wait until all is on the host."""


@dataclass
class Ftrain(Subject):
    copies: DeviceCopies = field(default_factory=DeviceCopies)
    memory: torch.Tensor | None = None
    places: State = field(default_factory=dict)
    ticket: DeviceTicket | None = None

    def begin(self, state: State) -> None:
        if self.memory is None:
            nbytes = sum(align(tensor.nbytes) for tensor in state.values())
            self.memory = torch.zeros(nbytes, dtype=torch.uint8)
            reason = self.copies.pin(self.memory.data_ptr(), nbytes, [DEVICE])
            if reason:
                print(f"not pinned: {reason}", file=sys.stderr)
            at = 0
            for name, tensor in state.items():
                self.places[name] = self.memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                at += align(tensor.nbytes)
        pairs = zip(self.places.values(), state.values(), strict=True)
        self.ticket = self.copies.begin([(place.data_ptr(), tensor) for place, tensor in pairs])

    def before_write(self) -> None:
        assert self.ticket is not None
        self.ticket.order()

    def finish(self) -> State:
        assert self.ticket is not None
        self.ticket.wait()
        return self.places


@dataclass
class Cpu(Subject):
    result: State = field(default_factory=dict)

    def begin(self, state: State) -> None:
        self.result = {name: tensor.cpu() for name, tensor in state.items()}

    def before_write(self) -> None:
        pass

    def finish(self) -> State:
        return self.result


@dataclass
class Pinned(Subject):
    """Copies on a stream of their own into pinned tensors that are kept: what one writes by hand."""

    stream: torch.cuda.Stream = field(default_factory=lambda: torch.cuda.Stream(DEVICE))
    places: State = field(default_factory=dict)

    def begin(self, state: State) -> None:
        if not self.places:
            self.places = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for name, tensor in state.items()
            }
        self.stream.wait_stream(torch.cuda.current_stream(DEVICE))
        with torch.cuda.stream(self.stream):
            for name, tensor in state.items():
                self.places[name].copy_(tensor, non_blocking=True)

    def before_write(self) -> None:
        torch.cuda.current_stream(DEVICE).wait_stream(self.stream)

    def finish(self) -> State:
        self.stream.synchronize()
        return self.places


class Dcp(Subject):
    """DefaultStager as it comes: pinned, shared, in a thread, non-blocking; kept, as its documentation wants it."""

    def __init__(self) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._stager = DefaultStager(StagingOptions())
        self._staged: Future[State] | None = None

    def begin(self, state: State) -> None:
        staged = self._stager.stage(state)
        assert isinstance(staged, Future)
        self._staged = staged

    def before_write(self) -> None:
        self.finish()  # nothing else orders the optimizer after its copies

    def finish(self) -> State:
        assert self._staged is not None
        return self._staged.result()


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "ftrain": Ftrain,
    ".cpu()": Cpu,
    "pinned copies": Pinned,
    "DefaultStager": Dcp,
}


@dataclass(frozen=True)
class Turn:
    """One turn of one subject, in seconds but for the limit."""

    limit_gb_per_second: float
    alone: float  # from begin to all on the host, the device otherwise idle
    stall: float  # what the training thread waits for in a step with a snapshot in it
    step: float  # such a step
    plain_step: float


def now() -> float:
    torch.cuda.synchronize(DEVICE)
    return time.perf_counter()


def limit() -> float:
    """GB/s of one pinned copy to the host."""
    source = torch.empty(LIMIT_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty(LIMIT_BYTES, dtype=torch.uint8, pin_memory=True)
    seconds = []
    for _ in range(5):
        start = now()
        target.copy_(source, non_blocking=True)
        seconds.append(now() - start)
    return LIMIT_BYTES / min(seconds) / 1e9


@dataclass
class Training:
    """Steps of matrix products, then an optimizer that writes the whole state."""

    state: State
    products: int = 1

    def __post_init__(self) -> None:
        self._matrix = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)

    def calibrate(self, seconds: float) -> None:
        """Have a step's products take about this long."""
        self.step()
        self.products = 20
        start = now()
        self._compute()
        self.products = max(1, int(self.products * seconds / (now() - start)))

    def step(self, subject: Subject | None = None) -> tuple[float, float]:
        """(seconds of the step, seconds of it that the thread waited for the subject)."""
        start = now()
        stall = 0.0
        if subject is not None:
            stall += self._timed(lambda: subject.begin(self.state))
        self._compute()
        if subject is not None:
            stall += self._timed(subject.before_write)
        torch._foreach_add_(list(self.state.values()), 1e-3)
        return now() - start, stall

    def _compute(self) -> None:
        for _ in range(self.products):
            self._matrix @ self._matrix

    @staticmethod
    def _timed(call: Callable[[], None]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def turn(subject: Subject, state: State, training: Training) -> Turn:
    before = limit()
    start = now()
    subject.begin(state)
    subject.finish()
    alone = now() - start
    plain_step, _ = training.step()
    step, stall = training.step(subject)
    subject.finish()
    return Turn((before + limit()) / 2, alone, stall, step, plain_step)


def check(subject: Subject, state: State) -> None:
    """The bytes are right although the optimizer writes meanwhile. Also the turn that nobody counts: it allocates."""
    expected = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
    subject.begin(state)
    subject.before_write()
    torch._foreach_add_(list(state.values()), 1.0)
    for name, tensor in subject.finish().items():
        assert torch.equal(tensor, expected[name]), f"{name} has other bytes on the host"


def rows(workload: str, state: State, turns: dict[str, list[Turn]]) -> Iterator[str]:
    nbytes = sum(tensor.nbytes for tensor in state.values())
    for name, of_subject in turns.items():
        speeds = [nbytes / one.alone / 1e9 for one in of_subject]
        share = statistics.median(
            speed / one.limit_gb_per_second for speed, one in zip(speeds, of_subject, strict=True)
        )
        stalls = sorted(one.stall * 1e3 for one in of_subject)
        slower = statistics.median(one.step / one.plain_step - 1 for one in of_subject)
        yield (
            f"| {workload} | {name} | {statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f}) "
            f"| {share:.0%} | {statistics.median(stalls):.1f} ({stalls[0]:.1f} to {stalls[-1]:.1f}) | {slower:+.1%} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="of the states: 1 is 2.4 GB and 20,000 tensors")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        reason = _native.cuda_probe().reason or "this torch is built without CUDA"
        print(f"gpu_staging needs a CUDA GPU: {reason}", file=sys.stderr)
        return os.EX_UNAVAILABLE
    print(f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}, limit {limit():.1f} GB/s\n")
    print("| state | subject | GB/s (spread) | of the limit | stall, ms (spread) | step with a snapshot |")
    print("|---|---|---|---|---|---|")
    for workload, make in {"gpt": gpt, "many": many}.items():
        state = make(args.scale)
        training = Training(state)
        training.calibrate(COMPUTE_TO_COPY * sum(tensor.nbytes for tensor in state.values()) / limit() / 1e9)
        subjects = {name: SUBJECTS[name]() for name in args.subjects}
        for subject in subjects.values():
            check(subject, state)
        turns: dict[str, list[Turn]] = {name: [] for name in subjects}
        for _ in range(args.repeats):
            for name, subject in subjects.items():
                turns[name].append(turn(subject, state, training))
        print("\n".join(rows(workload, state, turns)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
