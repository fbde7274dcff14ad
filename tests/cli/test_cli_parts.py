"""What the commands share."""

from __future__ import annotations

import ast
import asyncio
import re
from pathlib import Path

import pytest

from ftrain import __version__
from ftrain.cli import options, running
from ftrain.cli.app import app
from ftrain.cli.policy import run_policy
from ftrain.core.membership import FormationPolicy
from ftrain.core.retention import Best, RetentionPolicy
from ftrain.core.schedule import CheckpointPolicy
from ftrain.core.supervision import RestartPolicy
from ftrain.errors import Unavailable, UsageError
from ftrain.spec import JobSpec

CLI = Path(running.__file__).parent


@pytest.mark.parametrize(("lease", "heartbeat"), [(60.0, 1.0), (10.0, 1.0), (2.0, 0.2)])
def test_policy_beats_in_a_lease_and_counts_silence_one_beat_short_of_it(lease: float, heartbeat: float) -> None:
    policy = run_policy("run", FormationPolicy(1, 1), RestartPolicy(), CheckpointPolicy(), lease, 30.0)
    assert (policy.lease_seconds, policy.heartbeat_seconds) == (lease - heartbeat, heartbeat)
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


def test_what_is_to_be_kept_is_read_from_flags() -> None:
    assert options.retention(2, "off", ()) == RetentionPolicy(2)
    assert options.retention(1, "1000", ("2:loss", "3:top-1 accuracy:max")) == RetentionPolicy(
        1, every_steps=1000, best=(Best(2, "loss"), Best(3, "top-1 accuracy", largest=True))
    )
    assert options.retention(1, "6h", ("1:loss:min",)) == RetentionPolicy(
        1, every_seconds=21600.0, best=(Best(1, "loss"),)
    )


@pytest.mark.parametrize(
    ("last", "every", "best", "said"),
    [
        (0, "off", "1:loss", "--keep 0"),
        (1, "6 hours", "1:loss", "--keep-every 6 hours"),
        (1, "off", "loss", "--keep-best loss: give how many"),
        (1, "off", "0:loss", "--keep-best 0:loss"),
        (1, "off", "1:loss:most", "--keep-best 1:loss:most"),
    ],
)
def test_what_cannot_be_kept_is_refused(last: int, every: str, best: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        options.retention(last, every, (best,))


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


@pytest.mark.parametrize(
    ("text", "rate"),
    [("off", 0), ("500MB", 500_000_000), ("1.5GiB", 3 << 29), ("2G", 2_000_000_000), ("64KB", 64_000), ("7", 7)],
)
def test_rates_are_bytes_a_second(text: str, rate: int) -> None:
    assert options.rate(text, "--persist-rate") == rate


@pytest.mark.parametrize("text", ["", "0", "0.0001B", "5iB", "-1MB", "1mb", "1MB/s", "9999999TiB"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"^--persist-rate {text}: "):
        options.rate(text, "--persist-rate")


def test_persist_rate_reaches_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs: list[JobSpec] = []
    monkeypatch.setattr("ftrain.cli.launch.run_job", lambda spec: specs.append(spec) or 0)
    script = tmp_path / "train.py"
    script.touch()
    for flags in ([], ["--persist-rate", "20MB"]):
        with pytest.raises(SystemExit):
            app(["launch", "--run-dir", str(tmp_path / "run"), *flags, str(script)])
    assert [spec.persist_bytes_per_second_max for spec in specs] == [0, 20_000_000]
