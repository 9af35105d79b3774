"""Whether a model fits a machine: a question that a plan answers, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbqlora.core.display import Displayed
from nbqlora.core.plan import Plan


@dataclass(frozen=True, kw_only=True, repr=False)
class FitReport(Displayed):
    """The answer.

    Args:
        plan: None where nothing fits.
        lines: how it would run, or what is missing and the smallest change that fits; and what was assumed.
    """

    model: str
    plan: Plan | None
    lines: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """There is a plan within the memory that is usable."""
        return self.plan is not None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plan = None if self.plan is None else self.plan.as_dict()
        return {"model": self.model, "fits": self.fits, "lines": list(self.lines), "plan": plan}

    def __repr__(self) -> str:
        return f"FitReport({self.model}: {'fits' if self.fits else 'does not fit'})"
