"""`ftrain`, whose agent kills itself while it saves: FTRAIN_TEST_PLACE says where, FTRAIN_TEST_STEP when."""

from __future__ import annotations

import os
import signal
from typing import Any

from ftrain.agent import coordinator_host, saver
from ftrain.cli.main import main
from ftrain.core import journal
from ftrain.storage.posix import PosixStorage

PLACE, STEP = "FTRAIN_TEST_PLACE", "FTRAIN_TEST_STEP"
PLACES = ("in a pack", "after one pack", "before the manifest", "after the manifest", "after the record")


def at(place: str, step: int) -> None:
    if os.environ[PLACE] == place and step >= int(os.environ[STEP]):
        os.kill(os.getpid(), signal.SIGKILL)


def hurt() -> None:
    persist, publish, store, write = (
        saver.persist_slot,
        coordinator_host.publish,
        coordinator_host._store,
        PosixStorage.write_pack,
    )

    def hurt_write(self: Any, path: str, pack: Any, effort: Any, **options: Any) -> Any:
        half = self._path(path).with_name(".half.tmp")
        half.parent.mkdir(parents=True, exist_ok=True)
        with half.open("xb") as file:
            pack.write(file.fileno())
            file.truncate(pack.nbytes // 2)
        at("in a pack", int(path.split("/")[1].removeprefix("step-")))
        half.unlink()
        return write(self, path, pack, effort, **options)

    def hurt_persist(storage: Any, attempt: Any, *arguments: Any) -> Any:
        pack = persist(storage, attempt, *arguments)
        at("after one pack", attempt.step)
        return pack

    def hurt_publish(storage: Any, attempt: Any, *arguments: Any) -> str:
        at("before the manifest", attempt.step)
        sha256 = publish(storage, attempt, *arguments)
        at("after the manifest", attempt.step)
        return sha256

    def hurt_store(storage: Any, request: Any) -> Any:
        reply = store(storage, request)
        if isinstance(request, journal.Create) and isinstance(
            body := journal.decode(request.data, request.path).body, journal.CommitBody
        ):
            at("after the record", body.attempt.step)
        return reply

    PosixStorage.write_pack = hurt_write  # type: ignore[method-assign]
    saver.persist_slot = hurt_persist
    coordinator_host.publish = hurt_publish
    coordinator_host._store = hurt_store


if __name__ == "__main__":
    hurt()
    main()
