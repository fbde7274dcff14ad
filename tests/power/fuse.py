"""The part of FUSE's protocol that a loop device needs of the file below it: reads, writes, and the sync of a flush.

The kernel's side is described in linux/fuse.h, of which the structures here are; nothing of libfuse is needed. One
directory with files of fixed names, one request at a time: what was answered before a sync came in is before it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

WRITE_BYTES_MAX = 1 << 20
ROOT = 1  # its inode
ATTRIBUTES_SECONDS = 3600
DIRECT = 1  # FOPEN_DIRECT_IO: every write comes here before it returns
NOTHING_TO_ANSWER = {2, 42}  # FORGET, BATCH_FORGET

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
_READ_OR_WRITE = struct.Struct("<QQIIQII")
_INIT = struct.Struct("<IIIIHHIIHHI7I")
_STATFS = struct.Struct("<QQQQQIIII6I")


class File(Protocol):
    """What stands behind a name."""

    name: str
    nbytes: int

    def read(self, offset: int, nbytes: int) -> bytes: ...

    def write(self, offset: int, data: memoryview) -> None: ...

    def sync(self) -> None: ...


def serve(mountpoint: Path, files: Sequence[File], ready: int) -> None:
    """Mount at `mountpoint` and answer until it is unmounted. Writes one byte to the descriptor `ready` when it is."""
    channel = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={channel},rootmode=40755,user_id=0,group_id=0"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"ftrain-power", os.fsencode(mountpoint), b"fuse", 0, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "cannot mount a file system in user space", str(mountpoint))
    os.write(ready, b"1")
    os.close(ready)
    session = _Session(files)
    while True:
        try:
            request = os.read(channel, WRITE_BYTES_MAX + 4096)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # taken back before it was read
                continue
            raise
        answer = session.answer(request)
        if answer is not None:
            os.write(channel, answer)


class _Session:
    def __init__(self, files: Sequence[File]) -> None:
        self._files = {ROOT + number: file for number, file in enumerate(files, 1)}

    def answer(self, request: bytes) -> bytes | None:
        _, opcode, unique, node, *_ = _IN.unpack_from(request)
        if opcode in NOTHING_TO_ANSWER:
            return None
        try:
            body = self._body(opcode, node, memoryview(request)[_IN.size :])
        except OSError as error:
            return _OUT.pack(_OUT.size, -(error.errno or errno.EIO), unique)
        return _OUT.pack(_OUT.size + len(body), 0, unique) + body

    def _body(self, opcode: int, node: int, body: memoryview) -> bytes:
        match opcode:
            case 1:  # LOOKUP
                name = bytes(body).rstrip(b"\0").decode()
                number = next((number for number, file in self._files.items() if file.name == name), None)
                if number is None:
                    raise OSError(errno.ENOENT, name)
                times = struct.pack("<QQQQII", number, 0, ATTRIBUTES_SECONDS, ATTRIBUTES_SECONDS, 0, 0)
                return times + self._attributes(number)
            case 3 | 4:  # GETATTR, SETATTR: there is nothing to set
                return struct.pack("<QII", ATTRIBUTES_SECONDS, 0, 0) + self._attributes(node)
            case 14:  # OPEN
                return struct.pack("<QIi", 0, DIRECT, -1)
            case 15:  # READ
                _, offset, nbytes, *_ = _READ_OR_WRITE.unpack_from(body)
                return self._files[node].read(offset, nbytes)
            case 16:  # WRITE
                _, offset, nbytes, *_ = _READ_OR_WRITE.unpack_from(body)
                self._files[node].write(offset, body[_READ_OR_WRITE.size :][:nbytes])
                return struct.pack("<II", nbytes, 0)
            case 17:  # STATFS
                return _STATFS.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0, *(0,) * 6)
            case 20:  # FSYNC
                self._files[node].sync()
                return b""
            case 26:  # INIT
                big_writes, max_pages = 1 << 5, 1 << 22
                pages = WRITE_BYTES_MAX // 4096
                flags = big_writes | max_pages
                return _INIT.pack(7, 31, 0, flags, 16, 12, WRITE_BYTES_MAX, 1, pages, 0, 0, *(0,) * 7)
            case 18 | 25 | 29 | 38:  # RELEASE, FLUSH, RELEASEDIR, DESTROY
                return b""
            case 27:  # OPENDIR
                return struct.pack("<QIi", 0, 0, -1)
            case 28:  # READDIR: nobody needs a list
                return b""
        raise OSError(errno.ENOSYS, f"operation {opcode}")

    def _attributes(self, node: int) -> bytes:
        if node == ROOT:
            return _ATTRIBUTES.pack(ROOT, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 4096, 0)
        nbytes = self._files[node].nbytes
        mode = stat.S_IFREG | 0o644
        return _ATTRIBUTES.pack(node, nbytes, nbytes // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
