"""Figures with matplotlib, made without pyplot: nothing global is opened, and nothing has to be closed."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure

from nbqlora.core.report import Report
from nbqlora.core.units import gib


class ShownFigure(Figure):
    """A figure that Jupyter shows as PNG without an inline backend."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def run_figure(report: Report) -> ShownFigure:
    """Loss over the steps, and peak memory beside the plan's prediction and limit."""
    figure = ShownFigure(figsize=(8, 3), layout="constrained")
    loss, memory = figure.subplots(1, 2)
    steps = [e.step for e in report.steps]
    loss.plot(steps, [e.loss for e in report.steps], marker=".", color="#426EBD", label="training")
    if report.evals:
        loss.plot(
            [e.step for e in report.evals], [e.loss for e in report.evals], "s--", color="#E88543", label="evaluation"
        )
    loss.set(title="Loss per learned token", xlabel="step", ylabel="loss")
    loss.legend(frameon=False)
    memory.plot(steps, [gib(e.peak_bytes) for e in report.steps], color="#31865A", label="peak so far")
    memory.axhline(gib(report.predicted_peak_bytes), linestyle="--", color="#7C4293", label="plan")
    highest = max(report.measured_peak_bytes, report.predicted_peak_bytes)
    if report.plan.usable_bytes < 3 * highest:  # a limit far above would flatten everything else
        memory.axhline(gib(report.plan.usable_bytes), linestyle=":", color="#6F6F6F", label="usable")
    memory.set(title="Memory", xlabel="step", ylabel="GiB", ylim=(0, 1.25 * max(memory.get_ylim())))
    memory.legend(frameon=False, loc="lower right")
    for axes in (loss, memory):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
