"""What of a checkpoint is to be loaded, under which names, and how strictly: the options of `load`, checked once."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping

import torch

from ftrain.checkpoint.state.items import torch_dtype
from ftrain.errors import UsageError

Rename = Mapping[str, str] | Callable[[str], str]
SAME, CAST = "same", "cast"


class Terms:
    """Without arguments: everything, under the names that it was saved under, and nothing may differ."""

    def __init__(
        self,
        only: str | Iterable[str] | None = None,
        rename: Rename | None = None,
        strict: bool = True,
        dtype: str = SAME,
    ) -> None:
        if dtype not in (SAME, CAST):
            raise UsageError(f'dtype={dtype!r}: give "same", or "cast" to have tensors converted to the dtypes here')
        self.strict = strict
        self.casts = dtype == CAST
        self.renames = rename is not None
        self._rename = rename or {}
        patterns = [only] if isinstance(only, str) else only
        self._only = None if patterns is None else re.compile("|".join(map(_expression, patterns)) or "(?!)")

    @property
    def chooses(self) -> bool:
        """Whether not everything is wanted."""
        return self._only is not None

    def wants(self, key: str) -> bool:
        """Whether a key of here is to be loaded: a pattern of `only` matches it, or a name that it begins with."""
        return self._only is None or self._only.fullmatch(key) is not None

    def wants_object(self, name: str) -> bool:
        """Whether an object is to be loaded that can only be loaded as a whole."""
        return self.wants(name) or self.wants(f"{name}.")

    def here(self, key: str) -> str:
        """What is called here what was saved as `key`: the longest name that it begins with is exchanged."""
        if not isinstance(self._rename, Mapping):
            found = self._rename(key)
            if not isinstance(found, str):
                raise UsageError(f"rename({key!r}) returned {found!r}: it has to return a name")
            return found
        end = len(key)
        while end > 0:
            if key[:end] in self._rename:
                return ".".join(filter(None, (self._rename[key[:end]], key[end + 1 :])))
            end = key.rfind(".", 0, end)
        return f"{self._rename['']}.{key}" if "" in self._rename else key


def can_cast(saved: str, here: str) -> bool:
    """Whether values of a dtype may become those of another: floats of any width, but no float an integer."""
    return torch.can_cast(torch_dtype(saved), torch_dtype(here))


def _expression(pattern: str) -> str:
    return f"{fnmatch.translate(pattern)}|{fnmatch.translate(f'{pattern}.*')}"


EVERYTHING = Terms()
