"""Where a state and a checkpoint are not of one model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ftrain.checkpoint.state.source import TensorInfo
from ftrain.core.layout import TensorSpec

_NAMED_MAX = 5  # keys in one error


@dataclass(slots=True)
class Comparison:
    """Tensors by key, in the order of the state: those that cannot be filled, and those that nobody asks for."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    different: dict[str, tuple[TensorInfo, TensorSpec]] = field(default_factory=dict)

    def __str__(self) -> str:
        """What is wrong, for an error; empty where nothing is."""
        different = [
            f"{key} ({saved.dtype}{list(saved.shape)} saved, {here.dtype}{list(here.shape)} here)"
            for key, (saved, here) in self.different.items()
        ]
        parts = [
            _named("not in the checkpoint", self.missing),
            _named("only in the checkpoint", self.unexpected),
            _named("different", different),
        ]
        return "; ".join(filter(None, parts))


def compare(
    specs: Iterable[TensorSpec],
    shared: Mapping[str, TensorInfo],
    own: Mapping[str, TensorInfo],
    elsewhere: Collection[str],
) -> Comparison:
    """Compare the tensors of a state with those of a checkpoint: shared ones, and those of one rank alone.

    `elsewhere` are keys that are not to be missed here.
    """
    found = Comparison()
    asked = set(elsewhere)
    for spec in specs:
        saved = (own if spec.private else shared).get(spec.key)
        if saved is None:
            found.missing.append(spec.key)
        elif saved.shape != spec.shape or saved.dtype != spec.dtype:
            found.different[spec.key] = saved, spec
        if not spec.private:
            asked.add(spec.key)
    if not asked >= shared.keys():
        found.unexpected = [key for key in shared if key not in asked]
    return found


def _named(what: str, keys: Sequence[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _NAMED_MAX} more" if len(keys) > _NAMED_MAX else ""
    return f"{what}: {', '.join(keys[:_NAMED_MAX])}{more}"
