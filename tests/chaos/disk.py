"""A small file system of its own for a run directory, that can be full or stand still; for root, on Linux."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

DISK_BYTES = 256 << 20
BALLAST_BYTES = 1 << 20


def available() -> str:
    """Why there is none here, "" where there is one."""
    if os.geteuid() != 0:
        return "only root may mount"
    with tempfile.TemporaryDirectory() as directory:
        try:
            Disk(Path(directory)).close()
        except (OSError, subprocess.CalledProcessError) as error:
            told = error.stderr if isinstance(error, subprocess.CalledProcessError) else b""
            return f"no loop device with ext4 can be mounted: {error} {told.decode(errors='replace')}".strip()
    return ""


class Disk:
    """An ext4 file system in a file below `path`, mounted at `root` until `close`."""

    def __init__(self, path: Path) -> None:
        image, self.root = path / "disk.img", path / "disk"
        self._ballast = self.root / "ballast"
        self._freezers: list[subprocess.Popen[bytes]] = []
        self.root.mkdir()
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        _do("mkfs.ext4", "-q", "-m", "0", str(image))
        _do("mount", "-o", "loop", str(image), str(self.root))

    def fill(self) -> None:
        """Until not one more byte can be written."""
        with self._ballast.open("ab", buffering=0) as file:
            size = BALLAST_BYTES
            while size:
                try:
                    file.write(b"\1" * size)
                except OSError:
                    size //= 2

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def freeze(self, seconds: float) -> bool:
        """Whoever writes waits so long. Returns at once: False where it is frozen already."""
        if any(freezer.poll() is None for freezer in self._freezers):
            return False
        # A process of its own thaws it, also when this one is killed meanwhile.
        command = 'fsfreeze -f "$0" && { sleep "$1"; fsfreeze -u "$0"; }'
        self._freezers.append(subprocess.Popen(["sh", "-c", command, str(self.root), f"{seconds:.3f}"]))
        return True

    def thawed(self) -> None:
        """Wait until it is."""
        for freezer in self._freezers:
            freezer.wait()
        self._freezers.clear()

    def close(self) -> None:
        self.thawed()
        with contextlib.suppress(FileNotFoundError):
            self.empty()
        _do("umount", str(self.root))


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
