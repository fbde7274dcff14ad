"""Cuts the power of a real disk, with a real file system on it, at flush points of a run, and judges what is left.

python -m tests.power --file-system ext4 --all          every flush point of a run with 20 commits
python -m tests.power --file-system xfs --points 200    so many, drawn by --seed
python -m tests.power --bug "the file is not synced"    with a planted bug: must find losses
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tests.power.bugs import BUGS
from tests.power.file_system import FILE_SYSTEMS, memory, unavailable
from tests.power.run import RunFailed, record
from tests.power.search import Search

UNAVAILABLE = 69


def main() -> None:
    args = _arguments()
    kind = FILE_SYSTEMS[args.file_system]
    if args.sector_bytes:
        kind = replace(kind, sector_bytes=args.sector_bytes)
    if why := unavailable(kind):
        print(f"the power cannot be cut here: {why}", file=sys.stderr)
        sys.exit(UNAVAILABLE)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ftrain-power-", dir=args.directory or memory()) as directory:
        place, judging = Path(directory), Path(directory) / "judge"
        judging.mkdir()
        try:
            recording = record(kind, place, args.commits, args.bug, args.pause)
        except RunFailed as error:
            sys.exit(str(error))
        print(recording.text(), flush=True)
        search = Search(recording, judging, args.seed)
        found = search.run(None if args.all else args.points, args.resumes, lambda line: print(line, flush=True))
    print("\n".join([*found.losses[:20], found.text(), f"{time.monotonic() - began:.0f} s"]))
    sys.exit(1 if found.losses else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.power", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file-system", choices=tuple(FILE_SYSTEMS), default="ext4")
    parser.add_argument("--commits", type=int, default=20)
    parser.add_argument("--points", type=int, default=100, help="flush points, with three cuts at each")
    parser.add_argument("--all", action="store_true", help="every flush point")
    parser.add_argument(
        "--resumes", type=int, default=4, help="from so many of the cuts a real run goes on, and is cut"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.1, help="seconds after each step: commits take their time")
    parser.add_argument("--bug", choices=tuple(BUGS), default="")
    parser.add_argument(
        "--sector-bytes", type=int, choices=(512, 4096), help="what the disk writes whole; default: what it must"
    )
    parser.add_argument("--directory", type=Path, help="where the disks are made; default: in memory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
