"""A merge and an export as text and HTML."""

from __future__ import annotations

from nbqlora.core import display
from nbqlora.core.merged import ExportedGguf, MergeReport
from nbqlora.core.units import format_bytes, format_seconds
from nbqlora.view.html import block, rows_html
from nbqlora.view.text import Row, aligned

BASES = {"original": "the published weights", "nf4": "the 4-bit weights that training saw"}


def register_merge_view() -> None:
    """Let ``MergeReport`` and ``ExportedGguf`` show themselves through this module."""
    display.register(MergeReport, text=merge_text, html=merge_html)
    display.register(ExportedGguf, text=export_text, html=export_html)


def merge_title(report: MergeReport) -> str:
    """``merged into DIR: 2.3 GiB in 8 s``."""
    return f"merged into {report.path}: {format_bytes(report.n_bytes)} in {format_seconds(report.seconds)}"


def merge_rows(report: MergeReport) -> list[Row]:
    """What was made of what, and whether it says the same."""
    dtype = "each tensor's own dtype" if report.dtype == "auto" else report.dtype
    files = f"{report.n_files} file{'s' if report.n_files != 1 else ''}, {dtype}"
    rows = [("base", report.base, BASES[report.base]), ("written", files, f"{report.n_changed} tensors changed")]
    if report.kept_bytes:
        done = "the same merge was there already" if report.kept_bytes == report.n_bytes else "by an earlier attempt"
        rows.append(("kept", format_bytes(report.kept_bytes), done))
    if report.spilled_bytes:
        rows.append(("spilled", format_bytes(report.spilled_bytes), "to disk: more than maximum_memory_usage allows"))
    rows.append(("ran on", report.device, ""))
    check = report.check
    if check is not None:
        same = f"same next token {check.n_same} of {check.n_tokens} times"
        words = f"logits within {check.relative:.1%} of their spread of base and adapter's"
        verdict = words if check.agrees else f"{words}: more than rounding, do not use it"
        rows.append(("check" if check.agrees else "CHECK", same, verdict))
    return rows


def merge_text(report: MergeReport) -> str:
    """The report as aligned lines."""
    return "\n".join([merge_title(report), *aligned(merge_rows(report))])


def merge_html(report: MergeReport) -> str:
    """Title and rows."""
    return block(merge_title(report), rows_html(merge_rows(report)))


def export_title(exported: ExportedGguf) -> str:
    """``exported to FILE: 0.13 GiB, Q8_0``."""
    return f"exported to {exported.path}: {format_bytes(exported.n_bytes)}, {exported.quantization}"


def export_rows(exported: ExportedGguf) -> list[Row]:
    """What is in the file, and what llama.cpp does otherwise with it."""
    counts = sorted(exported.tensor_types.items(), key=lambda item: -item[1])
    types = ", ".join(f"{n} {name}" for name, n in counts)
    rows: list[Row] = [
        ("tensors", str(exported.n_tensors), types),
        ("family", exported.architecture, "as llama.cpp names it"),
    ]
    return rows + [("note", "", note) for note in exported.notes]


def export_text(exported: ExportedGguf) -> str:
    """The export as aligned lines."""
    return "\n".join([export_title(exported), *aligned(export_rows(exported))])


def export_html(exported: ExportedGguf) -> str:
    """Title and rows."""
    return block(export_title(exported), rows_html(export_rows(exported)))
