"""What a search has done."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Report:
    """What was done. `enumerated` are the states of all moments, `distinct` those that differ, each judged once."""

    enumerated: Counter[str] = field(default_factory=Counter)
    distinct: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)  # of the scene, each with another fault
    drawn: int = 0  # moments with too many states for all of them
    violations: list[str] = field(default_factory=list)

    def line(self, name: str) -> str:
        counts = f"{self.runs[name]:5} runs {self.enumerated[name]:9} states {self.distinct[name]:8} judged"
        return f"{name:44} {counts} {len(self.violations):3} violations so far"

    def total(self) -> str:
        return (
            f"{sum(self.enumerated.values())} states enumerated, {sum(self.distinct.values())} different ones judged, "
            f"{self.drawn} moments drawn from, {len(self.violations)} violations"
        )
