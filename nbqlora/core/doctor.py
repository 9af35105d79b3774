"""What ``nbqlora doctor`` found: one check a line, each in one of four words.

``problem`` means that a run cannot work, ``warning`` that it works worse than it could, ``skipped`` that
nothing could be said. What to do stands beside what was found, so that a report can be acted on by itself.
No check holds a token, or a text that came with one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nbqlora.core.display import Displayed
from nbqlora.core.plain import plain

CheckStatus = Literal["ok", "warning", "problem", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Args:
        name: one word or two, the row's label.
        found: what is there.
        advice: what to do about it; "" when there is nothing to do.
    """

    name: str
    status: CheckStatus
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.found}; {self.advice}" if self.advice else self.found

    @classmethod
    def of(cls, name: str, status: CheckStatus, message: str) -> Check:
        """From a message of one line: what was found, ``; ``, what to do."""
        found, _, advice = message.partition("; ")
        return cls(name=name, status=status, found=found, advice=advice)


@dataclass(frozen=True, kw_only=True, repr=False)
class DoctorReport(Displayed):
    """All checks, in the order in which they matter to a run."""

    checks: tuple[Check, ...]

    @property
    def problems(self) -> tuple[Check, ...]:
        """What keeps a run from working."""
        return tuple(c for c in self.checks if c.status == "problem")

    @property
    def warnings(self) -> tuple[Check, ...]:
        """What makes it work worse than it could."""
        return tuple(c for c in self.checks if c.status == "warning")

    @property
    def ok(self) -> bool:
        """There is no problem; there may be warnings."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """``1 problem, 2 warnings``, or ``all well``."""
        counts = ((len(self.problems), "problem"), (len(self.warnings), "warning"))
        return ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for n, word in counts if n) or "all well"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"ok": self.ok, **plain(self)}

    def __repr__(self) -> str:
        return f"DoctorReport({self.verdict}; {len(self.checks)} checks)"
