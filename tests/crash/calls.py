"""Records what storage does to a directory, at the place where it does it, and hurts it on request.

The code of ftrain runs unchanged on a real directory. What it calls of `os` is replaced here: each call is noted, made,
and answered, unless a `Fault` is planned for it. The native writing of a pack is one call, after which the file is read
back: what was written before the next sync may be torn in any way, so the order of its writes does not matter.
tests/crash/test_recording.py compares this record with what strace sees.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ftrain._native import Pack
from ftrain.checkpoint import written
from ftrain.checkpoint.writing import persist
from ftrain.storage import posix
from tests.crash.disk import Op


class Killed(BaseException):
    """The process is no more. Nothing of what it would still do is done."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one call: killed before it, or `error` instead of it (`done`: although it was made).

    `part` of what was to be written is written before.
    """

    error: int = 0
    done: bool = False
    part: float = 0.0

    def __str__(self) -> str:
        if not self.error:
            return "killed" + (f" after {self.part:.0%} of it" if self.part else "")
        name = errno.errorcode[self.error]
        return (
            f"{name} though it was done" if self.done else f"{name}" + (f" after {self.part:.0%}" if self.part else "")
        )


KILL = Fault()
_DISK = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE)
_REFUSED = tuple(Fault(error) for error in _DISK)
_LOST = tuple(Fault(error, done=True) for error in (errno.EIO, errno.ESTALE))

# The faults of each kind of call. 0 with a part is a short write.
FAULTS: dict[str, tuple[Fault, ...]] = {
    "mkdir": (*_REFUSED, *_LOST, Fault(errno.EEXIST, done=True)),
    "open": (*_REFUSED, *_LOST),
    "write": (*_REFUSED, Fault(errno.EIO, part=0.5), Fault(errno.ENOSPC, part=0.5), Fault(0, part=0.5), *_LOST),
    "pack": (*_REFUSED, Fault(errno.EIO, part=0.5), Fault(errno.ENOSPC, part=0.5), Fault(errno.EIO, part=1.0)),
    "fsync file": _REFUSED,
    "fsync directory": (Fault(errno.EIO), Fault(errno.ENOSPC), Fault(errno.ESTALE)),
    "close": (Fault(errno.EIO, done=True), Fault(errno.ENOSPC, done=True), Fault(errno.ESTALE, done=True)),
    "link": (*_REFUSED, *_LOST, Fault(errno.EEXIST, done=True)),
    "symlink": (*_REFUSED, *_LOST, Fault(errno.EEXIST, done=True)),
    "rename": (*_REFUSED, *_LOST),
    "unlink": (Fault(errno.EIO), Fault(errno.ESTALE), *_LOST, Fault(errno.ENOENT, done=True)),
    "rmdir": (Fault(errno.EIO), Fault(errno.ESTALE), *_LOST, Fault(errno.ENOENT, done=True)),
    "read": (Fault(errno.EIO), Fault(errno.ESTALE)),
    "stat": (Fault(errno.EIO), Fault(errno.ESTALE)),
    "list": (Fault(errno.EIO), Fault(errno.ESTALE)),
}


class Recorder:
    """Records calls below `root`. `before` is asked with the number and kind of each call, and may answer a fault."""

    def __init__(self, root: Path, name: str) -> None:
        """`name` is a part of the names of temporary files, so that no two recorders make the same."""
        self.root = root
        self.name = name
        self.ops: list[Op] = []
        self.kinds: list[str] = []  # of each call
        self.before: Callable[[int, str], Fault | None] = lambda *_: None
        self.dead = False
        self.told: list[tuple[int, Any]] = []  # what the process said, and after how many operations
        self._files: dict[int, str] = {}  # path of each open descriptor
        self._names = 0
        self._real = {name: getattr(os, name) for name in _WRAPPED}
        self._read_bytes = Path.read_bytes

    def tell(self, what: Any) -> None:
        """The process says something to others, which cannot be taken back."""
        self.told.append((len(self.ops), what))

    @contextmanager
    def recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name in _WRAPPED:
                stack.enter_context(patch.object(os, name, getattr(self, f"_{name}")))
            stack.enter_context(patch.object(Path, "read_bytes", lambda path: self._read(path)))
            stack.enter_context(patch.object(persist, "Pack", self._pack))
            stack.enter_context(patch.object(written, "THREADS", 1))
            stack.enter_context(patch.object(posix.uuid, "uuid4", self._uuid))
            yield

    # ------------------------------------------------------------------------------------------------ the calls of os

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self._place(path, dir_fd)
        if place is None:
            return self._call("open", path, flags, mode, dir_fd=dir_fd)
        creates = bool(flags & os.O_CREAT)

        def do() -> int:
            descriptor: int = self._call("open", path, flags, mode, dir_fd=dir_fd)
            self._files[descriptor] = place
            if creates:
                self.ops.append(Op("create", place))
            return descriptor

        return self._made("open" if creates else "read", do)

    def _write(self, descriptor: int, data: Any) -> int:
        path = self._files.get(descriptor)
        if path is None:
            return self._call("write", descriptor, data)

        def do(part: float = 1.0) -> int:
            written: int = self._call("write", descriptor, data[: max(1, int(len(data) * part))])
            self._wrote(path)
            return written

        return self._made("write", do, do)

    def _fsync(self, descriptor: int) -> None:
        path = self._files.get(descriptor)
        if path is None:
            self._call("fsync", descriptor)
            return
        kind = "directory" if stat.S_ISDIR(self._call("fstat", descriptor).st_mode) else "file"

        def do() -> None:
            self._call("fsync", descriptor)
            self.ops.append(Op("sync", path))

        def fail() -> None:
            self.ops.append(Op("sync", path, failed=True))

        self._made(f"fsync {kind}", do, failed=fail)

    def _close(self, descriptor: int) -> None:
        path = self._files.pop(descriptor, None)
        if path is None or self.dead:
            self._call("close", descriptor)
            if path is not None:
                raise Killed
            return
        try:
            self._made("close", lambda: self._call("close", descriptor))
        except Killed:
            self._call("close", descriptor)
            raise

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._simple("mkdir", path, mode, dir_fd=dir_fd)

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._simple("rmdir", path, dir_fd=dir_fd)

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._simple("unlink", path, dir_fd=dir_fd)

    def _link(self, source: Any, target: Any, **more: Any) -> None:
        self._double("link", source, target, **more)

    def _symlink(self, to: Any, path: Any, target_is_directory: bool = False) -> None:
        place = self._place(path, None)
        assert place is not None

        def do() -> None:
            self._call("symlink", to, path, target_is_directory)
            self.ops.append(Op("symlink", place, os.fspath(to)))

        self._made("symlink", do)

    def _rename(self, source: Any, target: Any, **more: Any) -> None:
        self._double("rename", source, target, **more)

    def _stat(self, path: Any, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        def do() -> os.stat_result:
            found: os.stat_result = self._call("stat", path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
            return found

        return self._made("stat", do) if self._place(path, dir_fd) is not None else do()

    def _listdir(self, path: Any = ".") -> list[Any]:
        def do() -> list[Any]:
            return list(self._call("listdir", path))

        return self._made("list", do) if self._place(path, None) is not None else do()

    def _fstat(self, descriptor: int) -> os.stat_result:
        found: os.stat_result = self._call("fstat", descriptor)
        return found

    def _read(self, path: Path) -> bytes:
        if self._place(path, None) is None:
            return self._read_bytes(path)
        return self._made("read", lambda: self._read_bytes(path))

    def _pack(self, *arguments: Any) -> Any:
        return _RecordedPack(self, Pack(*arguments))

    def write_pack(self, pack: Pack, descriptor: int, options: dict[str, Any]) -> Any:
        """Called by the stand-in for a pack: one call, whatever it does inside."""
        path = self._files[descriptor]

        def do(part: float = 1.0) -> Any:
            sums = pack.write(descriptor, **options)
            if part < 1.0:
                os.truncate(descriptor, int(pack.nbytes * part) // 4096 * 4096)
            self._wrote(path)
            return sums

        return self._made("pack", do, do)

    # ---------------------------------------------------------------------------------------------------- what is made

    def _simple(self, name: str, path: Any, *more: Any, **options: Any) -> None:
        place = self._place(path, options.get("dir_fd"))

        def do() -> None:
            self._call(name, path, *more, **options)
            if place is not None:
                self.ops.append(Op(name, place))

        if place is None:
            do()
        else:
            self._made(name, do)

    def _double(self, name: str, source: Any, target: Any, **options: Any) -> None:
        places = self._place(source, None), self._place(target, None)
        assert None not in places

        def do() -> None:
            self._call(name, source, target, **options)
            self.ops.append(Op(name, str(places[0]), str(places[1])))

        self._made(name, do)

    def _made(
        self,
        kind: str,
        do: Callable[[], Any],
        do_part: Callable[[float], Any] | None = None,
        failed: Callable[[], None] = lambda: None,
    ) -> Any:
        """One call: made, or whatever the fault that is planned for it says."""
        if self.dead:
            raise Killed
        number = len(self.kinds)
        self.kinds.append(kind)
        fault = self.before(number, kind)
        if fault is None:
            return do()
        result = None
        if fault.done:
            result = do()
        elif fault.part and do_part is not None:
            result = do_part(fault.part)
        if fault.error:
            failed()
            if kind == "open" and isinstance(result, int):  # nobody will close it
                self._call("close", result)
            raise OSError(fault.error, os.strerror(fault.error))
        if fault.part:
            return result  # a short write
        self.dead = True
        raise Killed

    def _wrote(self, path: str) -> None:
        self.ops.append(Op("write", path, content=self._read_bytes(self.root / path)))

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        return self._real[name](*arguments, **options)

    def _place(self, path: Any, dir_fd: int | None) -> str | None:
        """The path below the root, or None where it is elsewhere."""
        if isinstance(path, int):
            return self._files.get(path)
        if dir_fd is not None:
            base = self._files.get(dir_fd)
            return None if base is None else f"{base}/{os.fspath(path)}".lstrip("/")
        text = os.fspath(path)
        root = str(self.root)
        if text == root:
            return ""
        return text[len(root) + 1 :] if text.startswith(f"{root}/") else None

    def _uuid(self) -> Any:
        self._names += 1
        return _Name(f"{self.name}{self._names:06d}")


_WRAPPED = (
    "open", "write", "fsync", "close", "mkdir", "rmdir", "unlink", "link", "symlink", "rename", "stat",
    "listdir", "fstat",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Name:
    hex: str


class _RecordedPack:
    """What storage is given in place of a pack."""

    def __init__(self, recorder: Recorder, pack: Pack) -> None:
        self._recorder = recorder
        self._pack = pack

    @property
    def nbytes(self) -> int:
        return self._pack.nbytes

    def write(self, descriptor: int, **options: Any) -> Any:
        return self._recorder.write_pack(self._pack, descriptor, options)
