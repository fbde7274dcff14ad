"""What `test_agent_spares` looks at: a nursery with spares, as an agent has it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from ftrain.agent import forks, proc
from ftrain.agent.child import Job
from ftrain.agent.workers import FD_NAMES
from ftrain.core.local import BOOT_VARIABLE, Boot

BOOT = Boot("run", "", "", 1, 0, 0, 1, 0, 0, 0, 0, 0, False, None)


class Stage:
    """A nursery, and the directory in which its forks write what they are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ended: list[int] = []
        self.nursery = forks.Nursery(lambda *end: self.ended.append(end[0]), lambda *_: None)
        self._null = os.open(os.devnull, os.O_RDWR)

    def children(self) -> list[int]:
        return sorted(proc.children(self.nursery.pid))

    async def spares(self, *, store: bool) -> list[int]:
        """Have them. Returns their pids."""
        for _ in range(2):
            self.nursery.working(1, (os.getpid(),), store=store)
        await until(lambda: len(self.children()) == 1 + store)
        return self.children()

    async def fork(self, name: str, boot: Boot | None = BOOT) -> int:
        fds = FD_NAMES if boot is not None else FD_NAMES[:2]
        path = str(self.directory / name)
        environment = {"PATH": os.environ["PATH"], "MARK": "told"}
        job = Job("function", "tests.agent.spare_scenes:stay", (path,), environment, str(self.directory), fds, boot)
        pid = await self.nursery.fork(job, [self._null] * len(fds))
        await until((self.directory / name).exists)
        return pid

    def told(self, name: str) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.directory / name).read_text())
        return found


def stay(path: str) -> None:
    """The job: write down what this process is, and stay."""
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    found = {
        "environment": {name: value for name, value in os.environ.items() if name != BOOT_VARIABLE},
        "directory": os.getcwd(),
        "descriptors": sorted(link.split("[")[0] for link in links),
        "leads its session": os.getsid(0) == os.getpid(),
        "parent": os.getppid(),
        "can be killed first": Path("/proc/self/oom_score_adj").read_text(),
    }
    Path(f"{path}.new").write_text(json.dumps({"pid": os.getpid(), **found}))
    Path(f"{path}.new").rename(path)
    time.sleep(1000)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # what /proc tells, tells nobody
        await asyncio.sleep(0.01)


async def used(stage: Stage) -> list[object]:
    spares = await stage.spares(store=True)
    rank, store = await stage.fork("rank"), await stage.fork("store", None)
    other = await stage.fork("other")
    return ["a rank's" * (rank in spares), "a store's" * (store in spares), "another" * (other not in spares)]


async def killed(stage: Stage) -> list[object]:
    spares = await stage.spares(store=False)
    os.kill(spares[0], signal.SIGKILL)
    await until(lambda: not stage.children())
    rank = await stage.fork("rank")
    return ["another" * (rank not in spares), [pid for pid in stage.ended if pid in spares]]


async def swept(stage: Stage) -> list[object]:
    spares = await stage.spares(store=True)
    stage.nursery.working(2, (os.getpid(),), store=True)
    stage.nursery.working(2, (os.getpid(),), store=True)
    stage.nursery.sweep()
    rank = await stage.fork("rank")
    return ["a rank's" * (rank in spares), len(stage.children())]


async def waited(stage: Stage) -> list[object]:
    for _ in range(2):
        stage.nursery.waiting()
    await until(lambda: len(stage.children()) == 1)
    spares = stage.children()
    rank = await stage.fork("rank")
    return ["a rank's" * (rank in spares)]


async def compared(stage: Stage) -> list[object]:
    await stage.spares(store=True)
    pids = [await stage.fork(name) for name in ("spare", "forked")]
    told = [stage.told(name) for name in ("spare", "forked")]
    assert [one.pop("pid") for one in told] == pids
    return list(told)


SCENES: dict[str, Callable[[Stage], Awaitable[list[object]]]] = {
    "used": used,
    "killed": killed,
    "swept": swept,
    "waited": waited,
    "compared": compared,
}


async def main(scene: str, directory: str) -> None:
    forks.SPARES_AFTER_SECONDS = forks.WAITING_SECONDS = 0.0
    stage = Stage(Path(directory))
    stage.nursery.start([], {**os.environ}, os.getcwd())
    await stage.nursery.ready()
    try:
        told = await SCENES[scene](stage)
        children = stage.children()
    finally:
        await stage.nursery.close()
    assert not [pid for pid in children if proc.session(pid)], "a process was left behind"
    print(json.dumps(told))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
