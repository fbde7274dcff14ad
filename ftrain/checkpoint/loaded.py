"""What became of a load: the report that it returns."""

from __future__ import annotations

from dataclasses import dataclass, fields

_NAMED_MAX = 5  # keys in a line for people


@dataclass(frozen=True, slots=True)
class Loaded:
    """What this rank loaded, and what not, by the names that tensors and values have here."""

    step: int  # the number of steps that were done when it was saved
    loaded: tuple[str, ...] = ()  # tensors that were filled
    missing: tuple[str, ...] = ()  # here, not in the checkpoint: left as they were
    unexpected: tuple[str, ...] = ()  # in the checkpoint, under a name that the state gives, but not here
    reshaped: tuple[str, ...] = ()  # of another shape here than in the checkpoint: left as they were
    cast: tuple[str, ...] = ()  # of those loaded, the ones that were converted to another dtype

    def __str__(self) -> str:
        """For people: a line for each of these that is not empty."""
        lines = [f"step {self.step}: {len(self.loaded)} tensors loaded"]
        for one in fields(self)[2:]:
            keys = getattr(self, one.name)
            if keys:
                more = f" and {len(keys) - _NAMED_MAX} more" if len(keys) > _NAMED_MAX else ""
                lines.append(f"{one.name}: {', '.join(keys[:_NAMED_MAX])}{more}")
        return "\n".join(lines)
