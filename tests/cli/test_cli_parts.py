"""What the commands share."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest

from ftrain import __version__
from ftrain.cli import options, running
from ftrain.cli.policy import run_policy
from ftrain.core.membership import FormationPolicy
from ftrain.core.schedule import CheckpointPolicy
from ftrain.core.supervision import RestartPolicy
from ftrain.errors import Unavailable

CLI = Path(running.__file__).parent


@pytest.mark.parametrize(("lease", "heartbeat"), [(10.0, 1.0), (2.0, 0.4)])
def test_policy_beats_several_times_in_a_lease(lease: float, heartbeat: float) -> None:
    policy = run_policy("run", FormationPolicy(1, 1), RestartPolicy(), CheckpointPolicy(), lease, 30.0)
    assert (policy.lease_seconds, policy.heartbeat_seconds) == (lease, heartbeat)
    assert policy.version == __version__


def test_policy_is_made_in_one_place() -> None:
    makers = [
        path.name
        for path in CLI.glob("*.py")
        if any(
            isinstance(x, ast.Call) and ast.unparse(x.func) == "RunPolicy"
            for x in ast.walk(ast.parse(path.read_text()))
        )
    ]
    assert makers == ["policy.py"]


def test_name_that_does_not_resolve_is_waited_for_without_holding_the_loop() -> None:
    async def wait() -> int:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.01)

        task = asyncio.create_task(others())
        with pytest.raises(Unavailable, match="cannot be resolved or reached"):
            await options.own_address("::no such name::", 1, 0.5)
        task.cancel()
        return turns

    assert asyncio.run(wait()) > 1


def test_whereabouts_that_cannot_be_written_do_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / running.WHEREABOUTS).mkdir()
    running.write_whereabouts(tmp_path, "127.0.0.1", 1)
    assert "`ftrain status` will not find this run" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [running.WHEREABOUTS]
