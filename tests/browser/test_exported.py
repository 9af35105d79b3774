"""A notebook that ran without a page, as GitHub shows it: no styles, no scripts, no widgets, and all of it readable."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.notebook.kernels import QUICK

pytestmark = pytest.mark.browser

SETUP = '%load_ext nbqlora\nimport json, nbqlora\nrows = json.load(open("rows.json"))'
CELL = '%%finetune run1\nmodel = "tiny"\ndata = "$rows"\neval_data = "$rows"\nmax_length = 96\nmax_steps = 12\n'
WIDGETS = [
    'nbqlora.planner_widget("tiny", rows, max_length=128)',
    'nbqlora.compare_widget(run1, "sun moon", max_new_tokens=12)',
    "nbqlora.timeline(run1)",
]


@pytest.mark.parametrize("mode", ["live", "static"])
def test_what_is_left_of_a_headless_run(
    mode: str, folder: Path, chromium: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    html = _as_on_github(_executed(mode, folder, monkeypatch))
    (folder / f"{mode}.html").write_text(html)
    page = chromium.new_page(viewport={"width": 900, "height": 1400})
    page.goto(f"file://{folder / mode}.html")
    text = page.inner_text("body")
    assert "run1: done in" in text and "step 12/12" not in text, "the last state, and no leftover of the progress"
    assert "%%finetune run1" in text and "the plan said" in text
    assert page.locator("th[scope=row]").count() > 10
    assert page.locator("img").first.evaluate("e => e.naturalWidth") > 500
    page.locator("img").first.scroll_into_view_if_needed()
    page.screenshot(path=str(pictures / f"github-{mode}.png"), full_page=True)
    if mode == "static":
        assert "lora_r = 16" in text and "sun moon" in text
        assert page.locator("table", has_text="at the peak").count() == 2, "of the run, and of its timeline"
    page.close()


def _executed(mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from nbclient import NotebookClient

    for name, value in {**QUICK, "NBQLORA_DISPLAY": mode, "PYTHONPATH": str(Path(__file__).parents[2])}.items():
        monkeypatch.setenv(name, value)
    cells = [SETUP, CELL, *(WIDGETS if mode == "static" else [])]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    assert "widgets" not in notebook.metadata, "state of widgets blanks a page on GitHub"
    return notebook


def _as_on_github(notebook: Any) -> str:
    """nbconvert's page with what GitHub takes out of outputs taken out."""
    from nbconvert import HTMLExporter

    for cell in notebook.cells:
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/html" in data:
                bare = re.sub(r"<(script|style|svg)\b.*?</\1>", "", data["text/html"], flags=re.S)
                data["text/html"] = re.sub(r'\s(?:style|on\w+)="[^"]*"', "", bare)
    return str(HTMLExporter(template_name="classic").from_notebook_node(notebook)[0])
