"""Which backend does transfers, and that a kernel or sandbox which refuses io_uring costs speed only."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ftrain._native import transfer_backend
from tests.native.engine import each_backend, has_io_uring

# In a process of its own, for a filter cannot be taken off: refuses one system call with EPERM, as containers do.
REFUSED = """
import ctypes, os, struct, sys
from array import array

from ftrain._native import Mapping, Pack, crc32c, fetch, memory_file, transfer_backend

LOAD, EQUAL, RETURN, ALLOW, ERRNO_EPERM = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050001
rows = [(LOAD, 0, 0, 0), (EQUAL, 0, 1, int(sys.argv[1])), (RETURN, 0, 0, ERRNO_EPERM), (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rows), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) != 0 or libc.prctl(22, 2, program, 0, 0) != 0:
    sys.exit("seccomp is not allowed here: " + os.strerror(ctypes.get_errno()))

assert transfer_backend() == transfer_backend("any") == "threads"
try:
    transfer_backend("io_uring")
except PermissionError as error:
    print(error)
source = memory_file("source")
os.ftruncate(source, 1 << 20)
mapping = Mapping(source, 1 << 20)
mapping.view()[:] = os.urandom(1 << 20)
target = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
column = lambda word: array("Q", [word])
pack = Pack(column(0), column(mapping.address), column(1 << 20), 1 << 20, 1 << 16, 1 << 20, b"")
boxes, _ = pack.write(target)
assert boxes == [crc32c(mapping.view())]
assert fetch([(target, True)], column(0), column(boxes[0]), column(0), column(1 << 20), column(0)) == []
print("written and read")
"""


@each_backend
def test_backend_that_is_asked_for_is_the_one_that_is_used(backend: str) -> None:
    assert transfer_backend(backend) == backend


def test_any_backend_is_io_uring_where_it_is_allowed() -> None:
    assert transfer_backend() == ("io_uring" if has_io_uring() else "threads")


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="any, io_uring or threads, not tape"):
        transfer_backend("tape")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="other numbers of system calls")
@pytest.mark.parametrize(("number", "name"), [(425, "io_uring_setup"), (426, "io_uring_enter")])
def test_sandbox_that_refuses_io_uring_gets_threads(tmp_path: Path, number: int, name: str) -> None:
    if not has_io_uring():
        pytest.skip("io_uring is refused to begin with")
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(number), str(tmp_path / "pack")],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "seccomp is not allowed" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    refusal, last = done.stdout.splitlines()
    assert name in refusal and last == "written and read"
