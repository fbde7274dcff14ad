"""`ftrain` as it is, which also says on the recorded disk what its coordinator's journal says, the moment that it may.

    python -m tests.power.told MARKS BUG launch ...

A commit counts as told the moment its record's creation has returned, which is before anybody hears of it; a
retirement counts from before its record's creation began. BUG is one of tests/power/bugs.py, or "" for none.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from unittest.mock import patch

import msgspec

from ftrain.agent import coordinator_host
from ftrain.cli.main import main as ftrain
from ftrain.core import journal
from ftrain.core.messages import Attempt
from ftrain.storage.base import Storage

SUBMITTED, ACKED, RETIRING = "submitted", "acked", "retiring"


class Mark(msgspec.Struct, frozen=True):
    what: str
    attempt: Attempt


def read_marks(lines: Sequence[bytes | memoryview]) -> list[Mark]:
    return [msgspec.json.decode(line, type=Mark) for line in lines]


def main() -> None:
    marks, bug, *arguments = sys.argv[1:]
    descriptor = os.open(marks, os.O_WRONLY | os.O_CLOEXEC)
    real = coordinator_host._store

    def mark(what: str, attempt: Attempt) -> None:
        os.pwrite(descriptor, msgspec.json.encode(Mark(what, attempt)), 0)

    def store(storage: Storage, request: journal.Create | journal.Read) -> journal.Created | journal.ReadBack:
        body = journal.decode(request.data, request.path).body if isinstance(request, journal.Create) else None
        if isinstance(body, journal.RetireBody):
            mark(RETIRING, body.attempt)
        elif isinstance(body, journal.CommitBody):
            mark(SUBMITTED, body.attempt)
        answer = real(storage, request)
        if isinstance(body, journal.CommitBody) and answer == journal.Created(request.path, journal.Outcome.CREATED):
            mark(ACKED, body.attempt)
        return answer

    sys.argv = ["ftrain", *arguments]
    with contextlib.ExitStack() as stack:
        if bug:
            from tests.power.bugs import planted

            stack.enter_context(planted(bug))
        stack.enter_context(patch.object(coordinator_host, "_store", store))
        ftrain()


if __name__ == "__main__":
    main()
