"""Plans, events, reports and comparisons as plain text: what a shell shows, and every display's text twin.

Rows are computed once, as ``(label, value, remark)``, and both the text and the HTML are made from them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from nbqlora.core.events import (
    DataEvent,
    EvalEvent,
    Event,
    NoteEvent,
    OomEvent,
    PhaseEvent,
    PlannedEvent,
    SavedEvent,
    StepEvent,
    StoppedEvent,
)
from nbqlora.core.plan import Plan
from nbqlora.core.report import Comparison, Report
from nbqlora.core.saving import SavingNeeds
from nbqlora.core.units import format_bytes, format_count, format_minutes, format_seconds
from nbqlora.view.measured import measured_rows

Row = tuple[str, str, str]
VALUE_WIDTH = 38


def plan_title(plan: Plan) -> str:
    """``demo -> Tesla T4, 13.8 of 14.7 GiB usable, fp16``."""
    of = f"{format_bytes(plan.usable_bytes)} of {format_bytes(plan.device.total_bytes)} usable"
    return f"{plan.model.name} ({format_count(plan.model.n_params)}) -> {plan.device.name}, {of}, {plan.dtype}"


def plan_rows(plan: Plan) -> list[Row]:
    """The plan line by line."""
    data = plan.data
    words = (
        f"{data.n_rows} rows, {format_count(data.n_tokens)} tokens, {format_count(data.n_supervised_tokens)} learned"
    )
    lengths = f"rows of {data.percentiles[2]} tokens in the middle, {data.max_tokens} at most"
    rows: list[Row] = [("data", words, lengths)]
    rows += [(d.name, d.value, d.because) for d in plan.decisions]
    parts = sorted(plan.budget.by_category.items(), key=lambda item: -item[1])
    held = " + ".join(f"{c.label} {format_bytes(n)}" for c, n in parts)
    rows.append(("peak", format_bytes(plan.predicted_peak_bytes), f"= {held}"))
    rows.append(("time", _time(plan), "a forecast, corrected after the first step"))
    room = f"adapter {format_bytes(plan.disk_bytes)}, {format_bytes(plan.device.disk_free_bytes)} free"
    rows.append(("saves to", plan.output_dir, room))
    rows += [] if plan.saving is None else [_afterwards(plan, plan.saving)]
    rows += [("note", "", n) for n in plan.notes]
    rows += [("unknown", "", u) for u in plan.unknowns]
    return rows


def _afterwards(plan: Plan, needs: SavingNeeds) -> Row:
    """What can be made of the adapter, and what that takes."""
    ram = f"merge needs {format_bytes(needs.ram_bytes)} of {format_bytes(plan.device.host_free_bytes)} RAM"
    disk = f"{format_bytes(needs.merged_bytes['bf16'])} of {format_bytes(plan.device.disk_free_bytes)} disk in bf16"
    card = f", {format_bytes(needs.vram_bytes)} VRAM at most" if needs.vram_bytes else ""
    files = [(name, needs.gguf_bytes[name], needs.between_bytes[name]) for name in ("Q8_0", "Q4_K_M")]
    made = [
        f"{name} {format_bytes(n)}{f' and {format_bytes(more)} in between' if more else ''}" for name, n, more in files
    ]
    return "afterwards", ram, f"{disk}{card}; GGUF: {', '.join(made)}"


def _time(plan: Plan) -> str:
    steps = f"{plan.total_steps} step{'s' if plan.total_steps != 1 else ''}"
    return f"{steps}, {format_minutes(plan.total_steps * plan.step_seconds)}" if plan.step_seconds else steps


def plan_text(plan: Plan) -> str:
    """The plan as aligned lines."""
    return "\n".join([f"plan  {plan_title(plan)}", *aligned(plan_rows(plan))])


def aligned(rows: Iterable[Row], width: int = 118) -> list[str]:
    """Rows as lines, the remarks wrapped."""
    lines = []
    for label, value, remark in rows:
        head = f"  {label:<10} {value:<{VALUE_WIDTH}}" if value else f"  {label:<10}"
        room = max(30, width - len(head) - 1)
        first, *rest = textwrap.wrap(remark, room) or [""]
        lines.append(f"{head} {first}".rstrip())
        lines += [" " * (len(head) + 1) + more for more in rest]
    return lines


def report_title(report: Report) -> str:
    """``run1: done in 1 min 40 s``."""
    why = f" ({report.reason})" if report.reason else ""
    return f"{report.name}: {report.status}{why} in {format_seconds(report.seconds)}"


def report_rows(report: Report) -> list[Row]:
    """The report line by line."""
    steps, evals = report.steps, report.evals
    rows: list[Row] = []
    if steps:
        of = f"{len(steps)} of {steps[-1].total_steps}"
        rows.append(("steps", of, f"loss {steps[0].loss:.3f} -> {steps[-1].loss:.3f}"))
    if evals:
        count = report.plan.data.n_eval_rows
        later = f" -> {evals[-1].loss:.3f}" if len(evals) > 1 else ", before the first step"
        rows.append(("eval", f"{count} rows", f"loss {evals[0].loss:.3f}{later}"))
    if report.tokens_per_second:
        seconds = sum(e.seconds for e in steps)
        rows.append(("speed", f"{report.tokens_per_second:,.0f} tokens/s", f"{format_seconds(seconds)} of training"))
    if report.measured_peak_bytes:
        planned = f"the plan said {format_bytes(report.predicted_peak_bytes)}"
        each = ", ".join(map(format_bytes, report.rank_peaks))
        rows.append(("peak", format_bytes(report.measured_peak_bytes), f"{planned}{each and f'; by rank {each}'}"))
    if report.memory is not None:
        rows += measured_rows(report.memory, report.plan.budget)
    rows += _shortages(report)
    if report.adapter:
        rows.append(("adapter", report.adapter.path, format_bytes(report.adapter.n_bytes)))
    rows += [("left as is", r.path, r.because) for r in report.replacements if not r.new]
    # The layers' policies stand in the plan.
    rows += [("engine", f"{r.path}: {r.new}", r.because) for r in report.replacements if r.new and r.old != "keep"]
    return rows


def _shortages(report: Report) -> list[Row]:
    """Where memory ran out, one row for each thing that was done about it."""
    found: dict[str, list[OomEvent]] = {}
    for event in report.events:
        if isinstance(event, OomEvent):
            found.setdefault(event.action, []).append(event)
    return [
        ("memory", f"ran out {len(of)} time{'s' if len(of) > 1 else ''}, step {of[0].step} ({of[0].phase})", action)
        for action, of in found.items()
    ]


def report_text(report: Report) -> str:
    """The report as aligned lines."""
    return "\n".join([report_title(report), *aligned(report_rows(report))])


def comparison_text(comparison: Comparison) -> str:
    """Prompt, base answer and tuned answer, one below the other."""
    blocks = []
    for prompt, base, tuned in comparison.rows:
        parts = [f"> {prompt}"]
        for label, answer in (("base", base), ("tuned", tuned)):
            body = "\n".join(
                line for part in answer.splitlines() or ["(nothing)"] for line in textwrap.wrap(part, 104) or [""]
            )
            parts.append(textwrap.indent(body, " " * 8).replace(" " * 8, f"  {label:<5} ", 1))
        blocks.append("\n".join(parts))
    return "\n\n".join(blocks)


def event_line(event: Event) -> str:
    """One line for a shell's log; ``""`` for an event that a shell need not show."""
    match event:
        case PhaseEvent():
            return f"[{event.phase}] {event.detail}".rstrip()
        case DataEvent():
            return str(event.report)
        case PlannedEvent():
            return plan_text(event.plan)
        case StepEvent():
            rate = event.n_tokens / event.seconds if event.seconds else 0.0
            return (
                f"  step {event.step}/{event.total_steps}  loss {event.loss:.3f}  {rate:,.0f} tokens/s  "
                f"peak {format_bytes(event.peak_bytes)}"
            )
        case EvalEvent():
            return f"  eval after step {event.step}  loss {event.loss:.3f}"
        case SavedEvent():
            return f"  saved {event.path} ({format_bytes(event.n_bytes)})"
        case StoppedEvent():
            return f"  stopped after step {event.step}: {event.reason}"
        case OomEvent():
            asked = f", {format_bytes(event.asked_bytes)} asked for" if event.asked_bytes else ""
            return f"  memory ran out in step {event.step} ({event.phase}{asked}): {event.action}"
        case NoteEvent():
            return f"  {event.text}"
        case _:
            return ""
