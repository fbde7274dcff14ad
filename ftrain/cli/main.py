"""The `ftrain` command: what has to be in place before everything else, and what comes after."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from ftrain.errors import ExitCode, FtrainError


def main() -> None:
    """A user's mistake ends in one line and its exit code, never in a traceback; so does SIGTERM, however early."""
    signal.signal(signal.SIGTERM, _leave_before_start)
    from ftrain.cli.app import app

    try:
        app()
    except FtrainError as error:
        print(f"ftrain: {error}", file=sys.stderr)
        raise SystemExit(int(error.exit_code)) from None


def _leave_before_start(number: int, frame: FrameType | None) -> None:
    """Nothing runs yet and nothing is written, so there is nothing to end in order.

    An exception would not do: it comes up in whatever import it meets, and some swallow or print it.
    """
    del number, frame
    os.write(2, b"ftrain: left on SIGTERM before anything was started\n")
    os._exit(ExitCode.PREEMPTED)


if __name__ == "__main__":
    main()
