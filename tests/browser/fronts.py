"""A notebook in a browser, driven as a person does: cells run, ■ pressed, themes and widths changed, pictures taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat

WIDE, NARROW = {"width": 1280, "height": 1100}, {"width": 600, "height": 1100}
PATIENCE_MS = 60_000
# Said by the front ends themselves, on any notebook: an icon, a font or a map that is not there.
_NOISE = ("favicon", ".map", "the server responded with a status of 404")


class Front:
    """One page of a front end.

    Args:
        page: playwright's.
        address: of the server.
        folder: that it serves.
        pictures: where screenshots go.
    """

    name = ""
    _cell = ""
    _output = ""

    def __init__(self, page: Any, address: str, folder: Path, pictures: Path) -> None:
        self.page, self.address, self.folder, self._pictures = page, address, folder, pictures
        self.errors: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda said: self._hear(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self._hear(str(error)))

    def _hear(self, text: str) -> None:
        if not any(noise in text for noise in _NOISE):
            self.errors.append(text)

    def open(self, name: str, cells: Sequence[str]) -> None:
        """Write a notebook and open it, its kernel ready."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.folder / f"{name}.ipynb")
        self.page.set_viewport_size(WIDE)
        self._open(f"{name}.ipynb")

    def cell(self, index: int) -> Any:
        """A cell."""
        return self.page.locator(self._cell).nth(index)

    def output(self, index: int) -> Any:
        """All that stands below a cell."""
        return self.cell(index).locator(self._output)

    def run(self, index: int) -> None:
        """Run a cell to its end."""
        self.start(index)
        self.wait(index)

    def picture(self, name: str, of: Any, *, narrow: bool = False, dark: bool = False) -> Path:
        """A screenshot with the last of these in view; nothing may stand out to the right of an output."""
        self.page.set_viewport_size(NARROW if narrow else WIDE)
        self.dark(dark)
        of.last.evaluate("e => e.scrollIntoView({block: 'end'})")
        self.page.wait_for_timeout(500)
        kind = "dark" if dark else "light"
        path = self._pictures / f"{self.name}-{name}-{kind}{'-600px' if narrow else ''}.png"
        self.page.screenshot(path=str(path))
        over = self.page.evaluate(
            """selector => [...document.querySelectorAll(selector)]
                .map(e => e.scrollWidth - e.clientWidth).filter(n => n > 1)""",
            f"{self._output}, {self._output} .jupyter-widgets, {self._output} .widget-html-content",
        )
        assert over == [], f"{path.name}: wider than its place by {over} px"
        return path

    def nudge(self, output: Any, description: str) -> None:
        """One step to the right on the slider with this description, by keyboard."""
        row = output.locator(".widget-inline-hbox", has=self.page.get_by_text(description, exact=True))
        row.locator(".noUi-handle, .ui-slider-handle").first.focus()
        self.page.keyboard.press("ArrowRight")

    def _open(self, file: str) -> None:
        raise NotImplementedError

    def start(self, index: int) -> None:
        """Run a cell, without waiting for its end."""
        raise NotImplementedError

    def wait(self, index: int) -> None:
        """Wait for a cell's end."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """Press ■."""
        raise NotImplementedError

    def dark(self, wanted: bool) -> None:
        """Change the theme."""
        raise NotImplementedError


class LabFront(Front):
    """JupyterLab."""

    name = "lab"
    _cell = ".jp-Notebook .jp-CodeCell"
    _output = ".jp-OutputArea"

    def _open(self, file: str) -> None:
        self.page.goto(f"{self.address}/doc/tree/{file}")
        self.page.wait_for_function(
            """() => {
                const panel = window.jupyterapp?.shell.currentWidget;
                const kernel = panel?.sessionContext?.session?.kernel;
                return panel?.context?.isReady && panel.sessionContext.isReady && kernel?.status === 'idle';
            }"""
        )
        self._dark = False

    def start(self, index: int) -> None:
        self.page.evaluate(
            """i => {
                const app = window.jupyterapp;
                app.shell.currentWidget.content.activeCellIndex = i;
                void app.commands.execute('notebook:run-cell');
            }""",
            index,
        )

    def wait(self, index: int) -> None:
        self.page.wait_for_function(
            r"""([cells, i]) => {
                const prompt = document.querySelectorAll(cells)[i].querySelector('.jp-InputArea-prompt');
                return /\[\d+\]/.test(prompt.textContent);
            }""",
            arg=[self._cell, index],
        )

    def interrupt(self) -> None:
        self.page.click('[data-command="notebook:interrupt-kernel"] >> visible=true')

    def dark(self, wanted: bool) -> None:
        if wanted == self._dark:
            return
        theme = "JupyterLab Dark" if wanted else "JupyterLab Light"
        self.page.evaluate("t => window.jupyterapp.commands.execute('apputils:change-theme', {theme: t})", theme)
        light = "false" if wanted else "true"
        self.page.wait_for_selector(f'body[data-jp-theme-light="{light}"]', state="attached")
        self._dark = wanted


class ClassicFront(Front):
    """The classic notebook, version 6; a dark page is one with a style sheet of the user's."""

    name = "classic"
    _cell = "#notebook-container .code_cell"
    _output = ".output"
    _DARK = """
        body, #notebook, #notebook-container, div.output_area, div.output_area pre, .rendered_html,
        .rendered_html th, .rendered_html td, .widget-html-content, .widget-label,
        .widget-readout { background: #111 !important; color: #ddd !important }
    """

    def _open(self, file: str) -> None:
        self.page.goto(f"{self.address}/notebooks/{file}")
        self.page.wait_for_selector(self._cell)
        self.page.wait_for_function("() => Jupyter.notebook.kernel && Jupyter.notebook.kernel.is_connected()")

    def start(self, index: int) -> None:
        self.page.evaluate("i => Jupyter.notebook.execute_cells([i])", index)

    def wait(self, index: int) -> None:
        self.page.wait_for_function(
            """i => {
                const cell = Jupyter.notebook.get_cells()[i];
                return !cell.element.hasClass('running') && cell.input_prompt_number > 0;
            }""",
            arg=index,
        )

    def interrupt(self) -> None:
        self.page.click('button[data-jupyter-action="jupyter-notebook:interrupt-kernel"]')

    def dark(self, wanted: bool) -> None:
        self.page.evaluate(
            """([wanted, css]) => {
                let sheet = document.getElementById('dark-sheet');
                if (!sheet) {
                    sheet = document.createElement('style');
                    sheet.id = 'dark-sheet';
                    document.head.append(sheet);
                }
                sheet.textContent = wanted ? css : '';
            }""",
            [wanted, self._DARK],
        )
