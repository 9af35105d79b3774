"""Measured memory beside the plan's: two lines, two tables, nothing before training."""

from __future__ import annotations

from dataclasses import replace

from nbqlora.core.memory_profile import MemoryProfile, PhaseMemory
from nbqlora.core.plan import MemoryBudget
from nbqlora.core.specs import MemoryCategory as M
from nbqlora.view.measured import measured_html, measured_rows

GIB = 1 << 30
PROFILE = MemoryProfile(
    kind="cuda",
    phases=tuple(
        PhaseMemory(phase=phase, peak_bytes=int(peak * GIB), after_bytes=int(after * GIB))
        for phase, peak, after in (
            ("load", 6.5, 5.5),
            ("forward", 12.1, 12),
            ("backward", 13.3, 5.8),
            ("save", 20, 5.6),
        )
    ),
    by_category={M.WEIGHTS: 5 * GIB, M.ACTIVATIONS: 8 * GIB},
)
BUDGET = MemoryBudget(
    by_category={M.WEIGHTS: 5 * GIB, M.ACTIVATIONS: 7 * GIB, M.LOSS: GIB // 4, M.CONTEXT: GIB // 4, M.DEQUANT: GIB // 4}
)


def test_two_lines() -> None:
    assert measured_rows(PROFILE, BUDGET) == [
        (
            "phases",
            "highest in backward",
            "load 6.5 GiB · forward 12.1 GiB · backward 13.3 GiB · save 20.0 GiB",
        ),
        (
            "holders",
            "measured (planned)",
            "weights 5.0 GiB (5.0 GiB) · activations, loss, workspaces 8.0 GiB (7.5 GiB) · dequant 0 MiB (0.25 GiB)",
        ),
    ]


def test_two_tables() -> None:
    page = measured_html(PROFILE, BUDGET)
    assert page.count("<table") == 2 and page.count("<tr>") == 5 + 4
    assert ">13.3 GiB</td>" in page and ">activations, loss, workspaces</th>" in page and ">7.5 GiB</td>" in page
    assert len(page) < 5000


def test_nothing_before_training() -> None:
    early = replace(PROFILE, phases=PROFILE.phases[:1])
    assert early.highest is None
    assert measured_rows(early, BUDGET) == [] and measured_html(early, BUDGET) == ""
