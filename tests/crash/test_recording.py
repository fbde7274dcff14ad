"""What the recorder notes is what the kernel is asked for: compared with strace, call by call."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash import scenes
from tests.crash.calls import Recorder
from tests.crash.search import Stage

CALLS = "mkdir,mkdirat,open,openat,write,pwrite64,fallocate,ftruncate,fsync,fdatasync,link,linkat,rename,renameat,"
CALLS += "renameat2,unlink,unlinkat,rmdir"
CHILD = """
import sys
from pathlib import Path
from tests.crash import scenes
from tests.crash.life import Life
from ftrain.storage.posix import PosixStorage

class Stage:
    def life(self):
        return Life(lambda: PosixStorage(Path(sys.argv[1])), "first.0")

scenes.commit(Stage())
"""
LINE = re.compile(r"^\d+ +(\w+)\((.*)\) += +(\d+)")
UNFINISHED = " <unfinished ...>"
STRING = re.compile(r'"([^"]*)"')
DESCRIPTOR = re.compile(r"^\d+<([^>]*)>")


def test_the_recorder_notes_every_call_that_changes_the_file_system(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    seen, noted = tmp_path / "seen", tmp_path / "noted"
    seen.mkdir()
    noted.mkdir()
    log = tmp_path / "log"
    command = [strace, "-f", "-y", "--seccomp-bpf", "-o", str(log), "-e", f"trace={CALLS},io_uring_setup", "-e"]
    # strace does not see what goes through io_uring: without it the engine makes the same calls by itself.
    command += ["inject=io_uring_setup:error=ENOSYS", sys.executable, "-c", CHILD, str(seen)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    if "ptrace" in done.stderr or "seccomp" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    recorder = Recorder(noted, "first")
    with recorder.recording():
        scenes.commit(Stage(noted, recorder, "first"))
    expected = [(op.kind, nameless(op.other or op.path)) for op in recorder.ops]
    assert once(calls(log.read_text(), str(seen))) == once(expected)


def calls(log: str, root: str) -> list[tuple[str, str]]:
    """(kind, path) of each call that succeeded below the root, as an `Op` has it."""
    found = []
    begun: dict[str, str] = {}  # by thread, of a call that others came between
    for line in log.splitlines():
        thread, _, rest = line.partition(" ")
        if line.endswith(UNFINISHED):
            begun[thread] = line.removesuffix(UNFINISHED)
            continue
        if "resumed>" in rest:
            line = begun.pop(thread, "") + rest.partition("resumed>")[2]
        match = LINE.match(line)
        if match is None:
            continue
        name, arguments, _ = match.groups()
        descriptor = DESCRIPTOR.match(arguments)
        paths = STRING.findall(arguments)
        path = descriptor[1] if descriptor and name in WITH_DESCRIPTOR else paths[-1] if paths else ""
        if descriptor and not path.startswith("/"):
            path = f"{descriptor[1]}/{path}"
        if not path.startswith(root) or (name.startswith("open") and "O_CREAT" not in arguments):
            continue
        found.append((KINDS[name], nameless(path[len(root) + 1 :])))
    return found


WITH_DESCRIPTOR = ("write", "pwrite64", "fallocate", "ftruncate", "fsync", "fdatasync")
KINDS = {
    "mkdir": "mkdir", "mkdirat": "mkdir", "open": "create", "openat": "create", "write": "write", "pwrite64": "write",
    "fallocate": "write", "ftruncate": "write", "fsync": "sync", "fdatasync": "sync", "link": "link", "linkat": "link",
    "rename": "rename", "renameat": "rename", "renameat2": "rename", "unlink": "unlink", "unlinkat": "unlink",
    "rmdir": "rmdir",
}  # fmt: skip


def nameless(path: str) -> str:
    """Without the part of a temporary name that nobody can know before."""
    return re.sub(r"\.[0-9a-z]+\.tmp$", ".tmp", path)


def once(calls: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A file's writes in a row as one: the recorder notes them together."""
    return [call for place, call in enumerate(calls) if call[0] != "write" or calls[place - 1 : place] != [call]]
