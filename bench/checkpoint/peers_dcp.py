"""torch.distributed.checkpoint: save, load, and async_save by thread and by process, with its own or a kept stager."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from states import State
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse


class Dcp:
    """One file per rank, synced, as DCP does unless told otherwise.

    `kept` stages with a DefaultStager that lives from save to save and copies in a thread of its own, into shared
    memory where a process saves. Pinned memory and non-blocking copies need an accelerator.
    """

    def __init__(self, rank: int, ranks: int, *, kept: bool = False, process: bool = False) -> None:
        del rank
        self._alone = ranks == 1
        self._process = process
        self._stager = DefaultStager(StagingOptions(False, process, True, False)) if kept else None
        # DCP's collectives run in a thread beside those of the training, so they need a group of their own.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def save(self, path: Path, state: State) -> None:
        writer = dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True)
        dcp.save(state, storage_writer=writer, process_group=self._group, no_dist=self._alone)

    def load(self, path: Path, state: State) -> None:
        reader = dcp.FileSystemReader(path)
        dcp.load(state, storage_reader=reader, process_group=self._group, no_dist=self._alone)

    def begin(self, path: Path, state: State) -> DcpPending:
        # Without a writer of ours: given one, DCP would stage with it instead of with its default stager.
        kind = AsyncCheckpointerType.PROCESS if self._process else AsyncCheckpointerType.THREAD
        return DcpPending(
            dcp.async_save(
                state,
                checkpoint_id=path,
                async_checkpointer_type=kind,
                async_stager=self._stager,
                process_group=self._group,
                no_dist=self._alone and not self._process,
            )
        )

    def close(self) -> None:
        """A kept stager forgets the copies of tensors that are gone; its process is ended with ours."""


class DcpPending:
    def __init__(self, response: Future[Any] | AsyncSaveResponse) -> None:
        if isinstance(response, AsyncSaveResponse):
            self._staged: Future[Any] | None = response.staging_completion
            self._saved: Future[Any] = response.upload_completion
        else:
            self._staged, self._saved = None, response

    def before_step(self) -> None:
        if self._staged is not None:
            self._staged.result()

    def done(self) -> bool:
        return self._saved.done()

    def result(self) -> None:
        self._saved.result()
