"""A plan once its longest micro-batch was tried: what that took, beside what was predicted.

The prediction of memory stays in the plan: a report sets it beside the run's own peak, and a figure that was measured
first would hide how good it was. The forecast of time is replaced, because only the first step knows better.
"""

from __future__ import annotations

from dataclasses import replace

from nbqlora.core.plan import Decision, Plan, Probed
from nbqlora.core.specs import BatchLayout, DataStats, DeviceSpec
from nbqlora.core.units import format_bytes, format_minutes, format_seconds
from nbqlora.planner.link import link_rate

NAME = "probe"


def probes(device: DeviceSpec) -> bool:
    """Whether a probe step is taken on such a machine."""
    return device.kind == "cuda"


def intended(device: DeviceSpec) -> Decision:
    """Of a plan that is not probed yet."""
    if probes(device):
        return Decision(name=NAME, value="before the first step", because="the longest micro-batch corrects this plan")
    return Decision(name=NAME, value="none", because="on a CPU it takes as long as a step, and the first step tells")


def corrected(plan: Plan, probed: Probed) -> Plan:
    """The plan with what was measured."""
    found = Decision(
        name=NAME,
        value=f"{format_bytes(probed.peak_bytes)}, {format_seconds(probed.seconds)}",
        because=f"measured before the first step, on the longest micro-batch: {probed.tokens:,} tokens; "
        f"{_left(plan, probed)}",
    )
    decisions = tuple(found if d.name == NAME else d for d in plan.decisions)
    return replace(plan, probed=probed, decisions=decisions, step_seconds=_step_seconds(plan, probed))


def in_words(plan: Plan, probed: Probed) -> str:
    """What a corrected plan says now: peak, time, and what finding it out took."""
    peak = f"peak {format_bytes(probed.peak_bytes)}, planned {format_bytes(plan.predicted_peak_bytes)}"
    whole = format_minutes((plan.step_seconds or 0.0) * plan.total_steps)
    cost = format_seconds(probed.total_seconds)
    return f"corrected after the probe: {peak}, {_left(plan, probed)}; {whole} of training; it took {cost}"


def _left(plan: Plan, probed: Probed) -> str:
    left, usable = plan.usable_bytes - probed.peak_bytes, format_bytes(plan.usable_bytes)
    return f"{format_bytes(left)} of {usable} left" if left >= 0 else f"{format_bytes(-left)} above {usable}"


def _step_seconds(plan: Plan, probed: Probed) -> float:
    """Of a step of usual micro-batches, and what cards send in it; the optimizer's own milliseconds are left out."""
    sending = plan.sent_bytes / link_rate(plan.device, plan.n_nodes)[0]
    share = min(1.0, _usual_tokens(plan.data, plan.micro_batch_size) / probed.tokens)
    return probed.seconds * share * plan.gradient_accumulation_steps + sending


def _usual_tokens(data: DataStats, rows: int) -> float:
    """Of a micro-batch; where rows are padded, the upper quartile stands for the longest of several."""
    padded = data.layout is BatchLayout.PADDED and rows > 1
    return rows * (float(data.percentiles[3]) if padded else data.n_tokens / max(1, data.n_sequences))
