"""The lines that measured memory is held against: the plan, what is usable, the card."""

from __future__ import annotations

from nbqlora.core.plan import Plan
from nbqlora.core.units import format_bytes

# A limit so far above what is used is said in words: drawn, it would flatten everything else.
FAR = 3


def plan_levels(plan: Plan, highest: float) -> tuple[list[tuple[str, float, str]], list[str]]:
    """Word, bytes and dash of plan, limit and card, and those too far above to be drawn, as words."""
    known = [("plan", float(plan.predicted_peak_bytes), "6 4"), ("usable", float(plan.usable_bytes), "2 3")]
    if plan.device.kind == "cuda":
        known.append(("card", float(plan.device.total_bytes), ""))
    reach = FAR * max(highest, plan.predicted_peak_bytes)
    near = [x for x in known if x[1] <= reach]
    return near, [f"{word} {format_bytes(n)}" for word, n, _ in known if n > reach]
