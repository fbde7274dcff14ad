"""What a process forked from the nursery does: become a worker, and run what it is told to.

A user's exception is written down with the traceback that the user would have seen without us, sent to the agent, and
printed; the process then ends as Python itself would end it, atexit handlers and all.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import random
import runpy
import signal
import socket
import sys
import time
import traceback
from types import TracebackType

import msgspec

from ftrain.core.local import BOOT_VARIABLE, STACK_SIGNAL, Boot, WorkerError
from ftrain.core.messages import TRACEBACK_CHARS_MAX, ErrorReport
from ftrain.errors import FtrainError

OUR_FILES = (os.path.dirname(__file__), os.path.dirname(runpy.__file__) + "/runpy.py", "<frozen runpy>")


class Job(msgspec.Struct, frozen=True):
    """What to run. `kind`: "script" (a path), "module" (a name), "exec" (a program), "function" ("module:name").

    `fds` names the descriptors that come with the job, in order: stdout, stderr, and for workers page, arena,
    channel, box. For a function, an argument "fd:NAME" becomes that descriptor's number.
    """

    kind: str
    target: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    directory: str
    fds: tuple[str, ...]
    boot: Boot | None = None


def run(job: Job, fds: list[int]) -> None:
    """Do the job. Returns or raises SystemExit as a program would; never returns for "exec"."""
    named = dict(zip(job.fds, fds, strict=True))
    _reset_signals()
    _adopt_streams(named)
    os.chdir(job.directory)
    os.environ.clear()
    os.environ.update(job.environment)
    if job.boot is not None:
        boot = msgspec.structs.replace(
            job.boot,
            page_fd=named["page"],
            arena_fd=named["arena"],
            channel_fd=named["channel"],
            box_fd=named["box"],
        )
        os.environ[BOOT_VARIABLE] = msgspec.json.encode(boot).decode()
    if job.kind == "exec":
        _execute(job, named)
    for fd in named.values():
        if fd > 2:
            os.set_inheritable(fd, False)
    random.seed()  # the forked state is everybody's
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL)
    channel = named.get("channel")
    try:
        _call(job, named)
    except FtrainError as error:
        _report(channel, error, brief=True)
        print(f"ftrain: {error}", file=sys.stderr, flush=True)
        raise SystemExit(int(error.exit_code)) from None
    except Exception as error:  # noqa: BLE001  # whatever the user's script raises
        _report(channel, error, brief=False)
        _print(error)
        raise SystemExit(1) from None


def _call(job: Job, named: dict[str, int]) -> None:
    sys.argv = [job.target, *job.arguments]
    match job.kind:
        case "script":
            sys.path.insert(0, os.path.dirname(os.path.abspath(job.target)))
            runpy.run_path(job.target, run_name="__main__")
        case "module":
            sys.path.insert(0, os.getcwd())
            runpy.run_module(job.target, run_name="__main__", alter_sys=True)
        case "function":
            module, _, name = job.target.partition(":")
            arguments = [str(named[word[3:]]) if word.startswith("fd:") else word for word in job.arguments]
            getattr(importlib.import_module(module), name)(*arguments)
        case _:
            raise AssertionError(f"no such kind of job: {job.kind}")


def _execute(job: Job, named: dict[str, int]) -> None:
    for name, fd in named.items():
        os.set_inheritable(fd, name in ("page", "arena", "channel", "box"))
    try:
        os.execvp(job.target, [job.target, *job.arguments])
    except OSError as error:
        print(f"ftrain: cannot run {job.target}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def _reset_signals() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _adopt_streams(named: dict[str, int]) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for name, number in (("stdout", 1), ("stderr", 2)):
        fd = named.pop(name)
        os.dup2(fd, number)
        os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        # A worker's lines are to be seen when they are written, as on a terminal.
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _report(channel: int | None, error: Exception, *, brief: bool) -> None:
    if channel is None:
        return
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(OUR_FILES)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    report = ErrorReport(
        type=name[:256],
        message=_sendable(str(error))[: TRACEBACK_CHARS_MAX // 4],
        traceback="" if brief else _sendable(_text(error))[-TRACEBACK_CHARS_MAX // 2 :],
        where=_sendable(where)[-256:],
        unix_seconds=time.time(),
    )
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(channel)) as agent:
        agent.send(msgspec.json.encode(WorkerError(report)))


def _sendable(text: str) -> str:
    """Text without the half characters that undecodable file names leave in it."""
    return text.encode("utf-8", "replace").decode()


def _text(error: Exception) -> str:
    return "".join(traceback.format_exception(type(error), error, _users(error.__traceback__)))


def _print(error: Exception) -> None:
    sys.stdout.flush()
    print(_text(error), file=sys.stderr, end="", flush=True)


def _users(found: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame that is the user's."""
    while found is not None and found.tb_frame.f_code.co_filename.startswith(OUR_FILES):
        found = found.tb_next
    return found
