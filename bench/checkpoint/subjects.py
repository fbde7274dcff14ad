"""Who is compared: the list of subjects, and what each of them can do."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from states import State


class Pending(Protocol):
    """An asynchronous save that has begun."""

    def before_step(self) -> None:
        """Called before the optimizer writes: waits until the state may change, unless the library waits by itself."""

    def done(self) -> bool:
        """Whether it is saved."""

    def result(self) -> None:
        """Wait until it is saved, or raise what failed."""


class Saver(Protocol):
    """Saves durably and loads in place. `path` is a folder: `save` makes it, and the ranks share it."""

    def save(self, path: Path, state: State) -> None: ...

    def load(self, path: Path, state: State) -> None: ...

    def begin(self, path: Path, state: State) -> Pending:
        """Save while the caller goes on; only where the subject has the phases "stall" and "train"."""

    def restore_held(self, path: Path, state: State, check: bool) -> dict[str, Any]:
        """Save, and restore from the memory that holds what was saved; only where the subject has the phase "arena".

        Seconds of that, and of a memcpy of the same bytes.
        """

    def close(self) -> None:
        """Give back what is kept from save to save, as far as the library lets go of it."""


@dataclass(frozen=True)
class Subject:
    """One way to save and load; `make` is "module:class" with the arguments `arguments`."""

    name: str
    make: str
    phases: frozenset[str]
    checksum: str = ""
    durable: str = ""
    needs: tuple[str, ...] = ()
    arguments: dict[str, bool] = field(default_factory=dict)
    grouped: bool = False  # wants a process group even for one rank

    def missing(self) -> list[str]:
        """The modules that it needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def load_class(self) -> type:
        module, _, name = self.make.partition(":")
        found = getattr(importlib.import_module(module), name)
        assert isinstance(found, type)
        return found


def phases(*names: str) -> frozenset[str]:
    return frozenset(names)


BLOCKING = ("save", "load", "memory")
ASYNC = ("stall", "train")

SUBJECTS = [
    Subject("ftrain", "ours:Ftrain", phases(*BLOCKING, *ASYNC, "arena"), "crc32c", "file and folder", ("ftrain",)),
    Subject("DCP", "peers_dcp:Dcp", phases(*BLOCKING), "none", "file"),
    Subject(
        "torch.save",
        "peers:TorchSave",
        phases(*BLOCKING),
        "none (its CRC-32 is switched off, that is faster)",
        "file and folder, by us",
    ),
    Subject("torch.load mmap", "peers:TorchSave", phases("load"), arguments={"mmap": True}),
    Subject(
        "safetensors",
        "peers:Safetensors",
        phases(*BLOCKING),
        "none",
        "file and folder, by us",
        ("safetensors", "numpy"),
    ),
    Subject("TensorStore", "peers_array:TensorStore", phases(*BLOCKING), "none", "file", ("tensorstore",)),
    Subject("zarr-python", "peers_array:ZarrPython", phases(*BLOCKING), "none", "syncfs, by us", ("zarr",)),
    Subject("DCP async, thread", "peers_dcp:Dcp", phases(*ASYNC)),
    Subject("DCP async, thread, kept stager", "peers_dcp:Dcp", phases(*ASYNC), arguments={"kept": True}),
    Subject("DCP async, process", "peers_dcp:Dcp", phases(*ASYNC), arguments={"process": True}, grouped=True),
    Subject(
        "DCP async, process, shared stager",
        "peers_dcp:Dcp",
        phases(*ASYNC),
        arguments={"kept": True, "process": True},
        grouped=True,
    ),
]
