"""Turns what people type into what the spec holds; every refusal says what was given and what is possible."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ftrain.core.codec import Codec
from ftrain.core.retention import Best, RetentionPolicy
from ftrain.core.schedule import CheckpointPolicy
from ftrain.errors import Unavailable, UsageError
from ftrain.storage.opening import is_url, open_storage

DEFAULT_PORT = 29500  # torchrun's
RESOLVE_SECONDS = 1.0
SNAPSHOTS_OF_REPLICAS = "10s"  # where `--snapshot-every` is auto
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def nodes(text: str) -> tuple[int, int]:
    """`N` or `MIN:MAX`."""
    try:
        low, _, high = text.partition(":")
        found = int(low), int(high or low)
    except ValueError:
        raise UsageError(f"--nnodes {text}: give a number of nodes, or MIN:MAX") from None
    if not 1 <= found[0] <= found[1]:
        raise UsageError(f"--nnodes {text}: needs 1 <= MIN <= MAX")
    return found


def processes(text: str) -> int:
    """`gpu`, `cpu`, `auto` or a number."""
    if text in ("gpu", "auto", "cpu"):
        gpus = visible_gpus()
        if text == "gpu" and gpus == 0:
            raise UsageError("--nproc-per-node gpu: this node has no NVIDIA GPU that can be seen; use cpu or a number")
        return gpus if gpus and text != "cpu" else len(os.sched_getaffinity(0))
    try:
        found = int(text)
    except ValueError:
        raise UsageError(f"--nproc-per-node {text}: give a number, or one of gpu, cpu, auto") from None
    if found < 1:
        raise UsageError(f"--nproc-per-node {text}: at least one process is needed")
    return found


def visible_gpus() -> int:
    """GPUs of this node, counted without starting a driver: the device files, less what CUDA_VISIBLE_DEVICES hides."""
    count = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in os.listdir("/dev"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([word for word in visible.split(",") if word.strip()]))


def endpoint(text: str) -> tuple[str, int]:
    """`HOST`, `HOST:PORT` or `[IPV6]:PORT`."""
    match = re.fullmatch(r"\[(?P<six>[0-9a-fA-F:]+)\](?::(?P<p6>\d+))?|(?P<host>[^:\s]+)(?::(?P<p4>\d+))?", text)
    if match is None or not _can_be_a_name(match["six"] or match["host"]):
        raise UsageError(f"--rdzv-endpoint {text}: give HOST:PORT")
    port = int(match["p6"] or match["p4"] or DEFAULT_PORT)
    if not 0 < port < 65536:
        raise UsageError(f"--rdzv-endpoint {text}: ports go from 1 to 65535")
    return match["six"] or match["host"], port


def _can_be_a_name(host: str) -> bool:
    try:
        host.encode("idna")
    except UnicodeError:  # an empty label, or one that is too long: looking it up would raise the same
        return False
    return True


def seconds(text: str, flag: str) -> float:
    """`30`, `30s`, `5m` or `1h`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise UsageError(f"{flag} {text}: give a time such as 30s, 5m or 1h")
    return float(match[1]) * _UNITS[match[2] or "s"]


def some_seconds(text: str, flag: str) -> float:
    """As `seconds`, but not none at all."""
    found = seconds(text, flag)
    if found <= 0:
        raise UsageError(f"{flag} {text}: the time must be longer than that")
    return found


def rate(text: str, flag: str) -> int:
    """Bytes a second: `500MB`, `2GB`, `512MiB`, `1000000`; `off` is 0."""
    if text == "off":
        return 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text)
    if match is None or (match[3] and not match[2]):
        raise UsageError(f"{flag} {text}: give bytes a second such as 500MB, 2GB or 512MiB, or off")
    found = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))
    if not 0 < found < 1 << 63:
        raise UsageError(f"{flag} {text}: needs at least one byte a second, and less than 8 EiB; off for no bound")
    return found


def codec(text: str, flag: str) -> Codec | None:
    """`zstd`, `blosc-zstd:5` …; `off` is None."""
    if text == "off":
        return None
    try:
        return Codec.parse(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text}: {error}; or off") from None


def disks(text: str) -> tuple[str, ...]:
    """Directories, separated by commas, as absolute paths; links in them stay, as other nodes may have others."""
    for name in text.split(",") if text else ():
        if not name or is_url(name):
            raise UsageError(f"--disks {text}: give directories, separated by commas")
    return tuple(os.path.abspath(name) for name in text.split(",")) if text else ()


def switch(text: str, flag: str) -> bool:
    """`on` or `off`."""
    if text not in ("on", "off"):
        raise UsageError(f"{flag} {text}: give on or off")
    return text == "on"


def checkpoints(every: str, snapshot_every: str, keep: RetentionPolicy) -> CheckpointPolicy:
    """Both periods are `100` (steps), `30s`, `5m`, `1h`, or `off`."""
    steps, seconds_ = _period(every, "--checkpoint-every")
    auto = snapshot_every == "auto"
    snapshot_steps, snapshot_seconds = _period(SNAPSHOTS_OF_REPLICAS if auto else snapshot_every, "--snapshot-every")
    return CheckpointPolicy(
        steps, seconds_, keep, snapshot_steps=snapshot_steps, snapshot_seconds=snapshot_seconds, snapshot_auto=auto
    )


def retention(last: int, every: str, best: Sequence[str]) -> RetentionPolicy:
    """`every` is a period, as for `checkpoints`; each of `best` is `2:loss` (the smallest) or `2:accuracy:max`."""
    if last < 1:
        raise UsageError(f"--keep {last}: at least the newest commit has to be kept")
    steps, seconds_ = _period(every, "--keep-every")
    return RetentionPolicy(last, steps, seconds_, tuple(_best(text) for text in best))


def _best(text: str) -> Best:
    match = re.fullmatch(r"([1-9]\d{0,5}):([^:]+)(?::(min|max))?", text)
    if match is None:
        raise UsageError(
            f"--keep-best {text}: give how many, and a name that step.log is given: 2:loss for the smallest, "
            "2:accuracy:max for the largest"
        )
    return Best(int(match[1]), match[2], largest=match[3] == "max")


def _period(every: str, flag: str) -> tuple[int, float]:
    """In steps and in seconds: at most one of them is not zero."""
    if every in ("off", "0"):
        return 0, 0.0
    if every.isdigit():
        return int(every), 0.0
    if re.fullmatch(r"\d+(?:\.\d+)?[smh]", every):
        return 0, some_seconds(every, flag)
    raise UsageError(f"{flag} {every}: give a number of steps (100), a time (30s, 5m), or off")


def streams(text: str, count: int, flag: str) -> tuple[frozenset[int], frozenset[int]]:
    """torchrun's `0`, `1`, `2`, `3` for all local ranks, or `0:3,1:1` one by one: (stdout ranks, stderr ranks)."""
    try:
        if ":" in text:
            per_rank = {int(rank): int(value) for rank, value in (part.split(":") for part in text.split(","))}
        else:
            per_rank = dict.fromkeys(range(count), int(text))
        if not set(per_rank.values()) <= {0, 1, 2, 3}:
            raise ValueError
    except ValueError:
        raise UsageError(f"{flag} {text}: give 0, 1 (stdout), 2 (stderr), 3 (both), or a map such as 0:3,1:1") from None
    return (
        frozenset(rank for rank, value in per_rank.items() if value & 1),
        frozenset(rank for rank, value in per_rank.items() if value & 2),
    )


def ranks(text: str) -> frozenset[int] | None:
    """`0,1`; nothing means all."""
    if not text:
        return None
    try:
        return frozenset(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--local-ranks-filter {text}: give local ranks such as 0,1") from None


def rendezvous(text: str) -> dict[str, str]:
    """torchrun's `--rdzv-conf`: `key=value,key=value`."""
    try:
        return dict(_pair(part) for part in text.split(",") if part)
    except ValueError:
        raise UsageError(f"--rdzv-conf {text}: give key=value,key=value") from None


def _pair(part: str) -> tuple[str, str]:
    key, equals, value = part.partition("=")
    if not equals:
        raise ValueError(part)
    return key.strip(), value.strip()


def directory(path: Path, flag: str, make: Callable[[Path], None]) -> Path:
    """The directory, made if need be and writable."""
    try:
        make(path)
        probe = path / f".ftrain-write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be written ({error.strerror}); give a directory that can") from None
    return path.resolve()


def run_place(given: str | Path, flag: str) -> tuple[str, Path]:
    """Where the journal and the checkpoints are, "" for the directory itself, and the directory on this node.

    A run in an object store has its other files in a directory whose name follows from the URL, below ./runs.
    """
    text = str(given)
    if not is_url(text):
        return "", Path(text)
    if text.startswith("file://"):
        return "", Path(unquote(urlsplit(text).path))
    url = text.rstrip("/")
    storage = open_storage(url)  # a wrong URL is told before anything is made
    if not url.partition("://")[2].partition("/")[2]:
        raise UsageError(f"{flag} {text}: name a run in the bucket, as in {url}/NAME")
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", url.rpartition("/")[2])
    return storage.url, Path("runs") / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def is_local(host: str) -> bool:
    """Whether `host` names this machine: then this node may host the coordinator."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except socket.gaierror:
        return False
    for address in addresses:
        family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((str(address), 0))
            except OSError:
                continue
            return True
    return False


async def own_address(host: str, port: int, wait_seconds: float) -> str:
    """The address by which the other nodes reach this one: the one from which `host` is reached.

    On clusters a node's name may come up later than we do: it is tried again for `wait_seconds`. Raises `Unavailable`.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            info = (await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM))[0]
            with socket.socket(info[0], info[1]) as probe:
                probe.connect(info[4])
                return str(probe.getsockname()[0])
        except OSError as error:
            if time.monotonic() >= deadline:
                raise Unavailable(
                    f"--rdzv-endpoint {host}: cannot be resolved or reached from here ({error})"
                ) from None
        await asyncio.sleep(RESOLVE_SECONDS)
