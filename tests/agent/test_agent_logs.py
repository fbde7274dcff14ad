"""The workers' output when there is no place for its files."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from ftrain.agent.logs import RankLogs
from ftrain.spec import Output


def write(directory: Path) -> None:
    async def through_the_pipe() -> None:
        logs = RankLogs(Output(directory), 1, 0, 0)
        for fd in logs.write_fds:
            os.write(fd, b"a line\n")
            os.close(fd)
        await logs.drained(10.0)

    asyncio.run(through_the_pipe())


def test_output_goes_to_the_terminal_and_to_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    assert (tmp_path / "generation-0001" / "rank-0" / "stdout.log").read_text() == "a line\n"
    assert capsys.readouterr().out == "[rank0]: a line\n"


def test_output_without_a_place_for_its_files_still_comes_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "generation-0001").touch()
    write(tmp_path)
    assert capsys.readouterr().out == "[rank0]: a line\n"
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "Not a directory; this output is on the terminal only"
    ] * 2
