"""Cuts the power at every moment of what a run does with its storage, and judges what is left.

python -m tests.crash --states 100000          so many different states, of every class of faults
python -m tests.crash --bugs                   the same with each planted bug: all of them must be found
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.crash.bugs import BUGS
from tests.crash.plan import find, search_all, search_disks, search_store
from tests.crash.scenes import on_two_disks
from tests.crash.search import searching
from tests.crash.store import StoreSearch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--states", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bugs", action="store_true")
    arguments = parser.parse_args()
    began = time.monotonic()
    if arguments.bugs:
        sys.exit(0 if find_bugs(arguments.seed) else 1)
    with searching(seed=arguments.seed, progress=lambda line: print(line, flush=True)) as search:
        search_all(search, arguments.states)
        with searching(seed=arguments.seed, progress=print, moment_max=16, opens=on_two_disks) as disks:
            search_disks(disks, arguments.states // 10)
        store = StoreSearch(arguments.seed, progress=lambda line: print(line, flush=True))
        search_store(store, arguments.states // 50)
        violations = [*search.report.violations, *disks.report.violations, *store.report.violations]
        totals = [search.report.total(), f"disks: {disks.report.total()}", f"store: {store.report.total()}"]
        print("\n".join([*totals, *violations[:20]]))
        print(f"{time.monotonic() - began:.0f} s")
        sys.exit(1 if violations else 0)


def find_bugs(seed: int) -> bool:
    found = True
    for name in BUGS:
        violations = find(name, seed)
        found = found and bool(violations)
        print(f"{name}: {(violations or ['NOT FOUND'])[0][:200]}", flush=True)
    return found


if __name__ == "__main__":
    main()
