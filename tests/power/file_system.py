"""Real file systems of this kernel, made in a file and mounted through a loop device; for root, on Linux."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.power.recorder import recording

MIB = 1 << 20
BUSY_SECONDS_MAX = 15.0


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A kind of them, as it is made and mounted. Nothing but what a power cut needs differs from the defaults.

    The disk writes a sector whole or not at all.
    """

    name: str
    nbytes: int
    sector_bytes: int
    make: tuple[str, ...]  # {sector_bytes} stands for those
    mount: str  # options

    def format(self, image: Path) -> None:
        with image.open("wb") as file:
            file.truncate(self.nbytes)
        do(*(part.format(sector_bytes=self.sector_bytes) for part in self.make), str(image))
        do("fallocate", "--dig-holes", str(image))  # every cut copies it


# All that is put off for later by default is done at once, so that it does not stand among the run's own writes; a
# copy of a mounted XFS has the same identity, which XFS otherwise refuses. XFS needs sectors as large as its blocks,
# which disks have had for years: where one of its directory blocks is torn so that the head is new and the rest is
# not, its recovery takes the block for written, passes over it, and the mount is refused for the block's checksum.
FILE_SYSTEMS = {
    "ext4": FileSystem(
        "ext4", 128 * MIB, 512, ("mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"), "loop"
    ),
    "xfs": FileSystem("xfs", 320 * MIB, 4096, ("mkfs.xfs", "-q", "-K", "-s", "size={sector_bytes}"), "loop,nouuid"),
}


@contextlib.contextmanager
def mounted(kind: FileSystem, device: Path, mountpoint: Path) -> Iterator[Path]:
    """The file system in the file `device`, as the kernel finds it: after a power cut it mends itself here."""
    mountpoint.mkdir(exist_ok=True)
    do("mount", "-t", kind.name, "-o", kind.mount, str(device), str(mountpoint))
    try:
        yield mountpoint
    finally:
        _unmount(mountpoint)


def _unmount(mountpoint: Path) -> None:
    """Processes that used it may still be on their way out."""
    deadline = time.monotonic() + BUSY_SECONDS_MAX
    while subprocess.run(["umount", str(mountpoint)], check=False, stderr=subprocess.DEVNULL).returncode != 0:
        if time.monotonic() > deadline:
            do("umount", str(mountpoint))
        time.sleep(0.05)


def unavailable(kind: FileSystem) -> str:
    """Why the power cannot be cut here, "" where it can."""
    if os.geteuid() != 0:
        return "only root may mount"
    for program in (kind.make[0], "mount", "umount"):
        if shutil.which(program) is None:
            return f"there is no {program} here"
    with tempfile.TemporaryDirectory(prefix="ftrain-power-", dir=memory()) as directory:
        place = Path(directory)
        try:
            kind.format(place / "image")
            with (
                recording(place / "image", place / "log", place / "fuse") as recorder,
                mounted(kind, recorder.disk, place / "disk"),
            ):
                return ""
        except subprocess.CalledProcessError as error:
            return f"{' '.join(error.cmd)}: {error.stderr.decode(errors='replace').strip()}"
        except OSError as error:
            return str(error)


def memory() -> str | None:
    """A folder in memory, where there is one: nothing here has to outlive anything."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def do(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
