"""The stand-in for libcuda.so.1 from Python: built once, loaded afresh for each test, steered and looked into."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parent
CUDA_SOURCES = FOLDER.parents[2] / "csrc" / "cuda"
NON_BLOCKING = 1
ILLEGAL_ADDRESS = 700
OUT_OF_MEMORY = 2

# Kept to the end of the process, which removes it.
_folder: tempfile.TemporaryDirectory[str] | None = None


@functools.cache
def library() -> Path:
    """The compiled stand-in."""
    global _folder
    _folder = tempfile.TemporaryDirectory(prefix="ftrain-standin-")
    path = Path(_folder.name) / "libcuda.so.1"
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    subprocess.run(
        [
            compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-fPIC", "-shared", "-fno-strict-aliasing",
            f'-DKERNELS="{CUDA_SOURCES / "kernels.cu"}"', *map(str, sorted(FOLDER.glob("*.cpp"))), "-o", str(path),
        ],
        check=True,
    )  # fmt: skip
    return path


def without(source: Path, target: Path, functions: list[str]) -> Path:
    """A copy of the library that has no function of these names: a driver of another age."""
    data = source.read_bytes()
    for name in functions:
        exported = b"\0" + name.encode() + b"\0"
        assert exported in data
        data = data.replace(exported, b"\0" + b"_" * len(name) + b"\0")
    target.write_bytes(data)
    return target


def required_functions() -> list[str]:
    """What a driver must have, by csrc/cuda/table.hpp."""
    text = (CUDA_SOURCES / "table.hpp").read_text()
    table = text[text.index("#define FTRAIN_CUDA_REQUIRED") : text.index("// Of driver 12.8")]
    return re.findall(r"X\((cu\w+),", table)


class Gpu:
    """One copy of the stand-in, with a context of the test's own on device 0, current on the test's thread."""

    def __init__(self, path: Path, seed: int = 1) -> None:
        self.path = str(path)
        self._lib = ctypes.CDLL(self.path)
        for name in ("counts", "living", "violations"):
            getattr(self._lib, f"standin_{name}").restype = ctypes.c_char_p
        self.seed(seed)
        self._context = ctypes.c_void_p()
        self._streams: list[int] = []
        self._allocations: list[int] = []

    def seed(self, seed: int) -> None:
        """Choose the order of all work from here on."""
        self._lib.standin_seed(ctypes.c_ulonglong(seed))

    def start(self) -> None:
        """Do what torch would have done before: start CUDA, take the primary context, make it current."""
        self._call("cuInit", 0)
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._call("cuCtxPushCurrent_v2", self._context)
        self._device = device.value

    def stop(self) -> None:
        """Give back what the test took. What is left then, somebody else has leaked."""
        self._lib.standin_drain()
        for stream in self._streams:
            self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))
        for address in self._allocations:
            self._call("cuMemFree_v2", ctypes.c_ulonglong(address))
        self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)
        self._streams, self._allocations = [], []

    def finish(self) -> None:
        """`stop`, and everything must be as it was before `start`, with no rule broken meanwhile."""
        gc.collect()
        self.stop()
        assert self.violations() == []
        assert self.living() == {}

    def stream(self) -> int:
        handle = ctypes.c_void_p()
        self._call("cuStreamCreateWithPriority", ctypes.byref(handle), NON_BLOCKING, 0)
        assert handle.value is not None
        self._streams.append(handle.value)
        return handle.value

    def allocate(self, nbytes: int) -> int:
        address = ctypes.c_ulonglong()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        self._allocations.append(address.value)
        return address.value

    def write(self, stream: int, address: int, data: bytes) -> None:
        """A kernel of the test's: in the stream's order, the bytes come to device memory."""
        self._lib.standin_write(
            ctypes.c_void_p(stream), self._context, ctypes.c_ulonglong(address), data, ctypes.c_size_t(len(data))
        )

    def move(self, stream: int, to: int, source: int, nbytes: int) -> None:
        """Another: device memory is copied within the device."""
        addresses = (ctypes.c_ulonglong(to), ctypes.c_ulonglong(source), ctypes.c_size_t(nbytes))
        self._lib.standin_move(ctypes.c_void_p(stream), self._context, *addresses)

    def peek(self, address: int, nbytes: int) -> bytes:
        """Device memory as it is at this moment."""
        buffer = ctypes.create_string_buffer(nbytes)
        self._lib.standin_peek(ctypes.c_ulonglong(address), buffer, ctypes.c_size_t(nbytes))
        return buffer.raw

    def drain(self) -> None:
        """Run all work, on all streams."""
        self._lib.standin_drain()

    def register(self, address: int, nbytes: int) -> None:
        """Pin memory as somebody else than ftrain would."""
        self._call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), 1)

    def unregister(self, address: int) -> None:
        self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    @contextmanager
    def gate(self, stream: int) -> Iterator[None]:
        """Inside, the stream stands still here."""
        gate = self._lib.standin_close_gate(ctypes.c_void_p(stream), self._context)
        try:
            yield
        finally:
            self._lib.standin_open_gate(gate)

    def fail(self, function: str, nth: int, code: int = ILLEGAL_ADDRESS) -> None:
        """The function's `nth` use from now on fails."""
        self._lib.standin_fail(function.encode(), nth, code)

    def count(self, function: str) -> int:
        count: int = self._lib.standin_count(function.encode())
        return count

    def counts(self) -> Mapping[str, int]:
        return self._table("counts")

    def living(self) -> Mapping[str, int]:
        """How much of each kind was made and not given back, where there is any."""
        return self._table("living")

    def violations(self) -> list[str]:
        """The rules that were broken: memory freed under a copy, bytes beside an allocation, and the like."""
        text: bytes = self._lib.standin_violations()
        return text.decode().splitlines()

    def blocking_streams(self) -> int:
        count: int = self._lib.standin_blocking_streams()
        return count

    def _table(self, name: str) -> Mapping[str, int]:
        text: bytes = getattr(self._lib, f"standin_{name}")()
        return {kind: int(count) for kind, count in (line.split() for line in text.decode().splitlines())}

    def _call(self, name: str, *arguments: object) -> None:
        self._lib.standin_pause_faults(True)  # those are for ftrain, and so is the counting
        code = getattr(self._lib, name)(*arguments)
        self._lib.standin_pause_faults(False)
        assert code == 0, f"{name} of the stand-in gave {code}"
