"""A run's memory over time, to look at: hover over a moment, choose the picture, keep it as a PNG.

The picture is SVG whose tooltips need no script, so the twin has them too; the widget adds the choice between the whole
run and one phase, and a button that writes the PNG beside the run's other files.
"""

from __future__ import annotations

from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as w

from nbqlora.core.errors import RunError
from nbqlora.core.memory_profile import MemoryProfile
from nbqlora.core.report import Report
from nbqlora.notebook.twin import Twinned
from nbqlora.run import Run
from nbqlora.view.figures import timeline_figure
from nbqlora.view.timeline import timeline_html, timeline_text

ALL = "all phases"


class Timeline(Twinned):
    """The memory of a finished run.

    Args:
        report: with measured memory.
        folder: where the button puts the PNG.
    """

    def __init__(self, report: Report, folder: Path) -> None:
        self._report, self._folder, self._profile = report, folder, _measured(report)

    def build(self) -> Any:
        """The choice of a phase, the picture, the button."""
        phases = [ALL, *(p.phase for p in self._profile.phases)]
        self.phase = w.ToggleButtons(options=phases, value=ALL, style={"button_width": "auto"})
        self.keep = w.Button(description="save as PNG", icon="download", layout={"width": "auto"})
        self._picture, self._said = w.HTML(_page(self._report)), w.HTML()
        self.phase.observe(self._chosen, names="value")
        self.keep.on_click(self._kept)
        below = w.HBox([self.keep, self._said], layout={"flex_flow": "row wrap"})
        return w.VBox([self.phase, self._picture, below], layout={"max_width": "900px"})

    def save(self, path: str | Path) -> Path:
        """Write the picture as PNG.

        Returns:
            Where it is.
        """
        place = Path(path)
        place.write_bytes(timeline_figure(self._report)._repr_png_())
        return place

    def twin(self) -> dict[str, Any]:
        """The whole run: words, SVG with tooltips, PNG."""
        return {
            "text/plain": timeline_text(self._report),
            "text/html": timeline_html(self._report),
            "image/png": timeline_figure(self._report)._repr_png_(),
        }

    def __repr__(self) -> str:
        return f"Timeline({self._report.name}, {len(self._profile.samples)} samples)"

    def _chosen(self, change: Any) -> None:
        profile = self._profile
        samples = tuple(s for s in profile.samples if change["new"] in (ALL, s.phase))
        self._picture.value = _page(replace(self._report, memory=replace(profile, samples=samples)))

    def _kept(self, _: Any) -> None:
        try:
            place = self.save(self._folder / f"{self._report.name}-memory.png")
        except OSError as error:
            self._said.value = f'<span role="alert">{escape(str(error))}</span>'
        else:
            self._said.value = f'<span role="status">saved {escape(str(place))}</span>'


def timeline(run: Run) -> Timeline:
    """Show a run's memory over time, by phase and by holder.

    Args:
        run: what ``%%finetune`` bound.

    Raises:
        RunError: its memory was not measured: it ended before anything was loaded.

    Example:
        >>> nbqlora.timeline(run1)
    """
    return Timeline(run.report, Path(run.plan.output_dir))


def _page(report: Report) -> str:
    # Widgets' own line height is that of a control.
    return f'<div style="line-height:1.4">{timeline_html(report)}</div>'


def _measured(report: Report) -> MemoryProfile:
    if report.memory is None or not report.memory.samples:
        raise RunError(f"{report.name} has no memory to show: it ended before anything was loaded")
    return report.memory
