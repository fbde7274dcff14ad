"""`ftrain`, whose pauses between failed attempts to save are a hundred times shorter."""

from __future__ import annotations

from ftrain.cli.main import main
from ftrain.core import schedule

if __name__ == "__main__":
    schedule.FAILED_PAUSES_SECONDS = tuple(seconds / 100 for seconds in schedule.FAILED_PAUSES_SECONDS)
    main()
