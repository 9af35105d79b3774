"""A plan to play with: length, rank, batch and memory as sliders, and what would run as a bar and a table.

Each move is one answer of :class:`nbqlora.run.what_if.WhatIf`: the planner itself, so what is shown is what a run would
do. A slider is heard when it is let go. The cell below the sliders holds the options as they stand; the button copies
it where the page lets scripts write to the clipboard, and says so where not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from html import escape
from typing import Any

import ipywidgets as w
from IPython import get_ipython

from nbqlora.core.errors import ConfigError, NbqloraError, Problem
from nbqlora.core.fit import FitReport
from nbqlora.core.specs import DeviceSpec
from nbqlora.core.units import GIB
from nbqlora.memory.host import disk_free_bytes, read_host
from nbqlora.notebook.twin import Twinned
from nbqlora.planner.known import device_of
from nbqlora.run.what_if import WhatIf
from nbqlora.view import register_all

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
RANKS = (4, 8, 16, 32, 64, 128, 256)
BATCHES = ("auto", 1, 2, 4, 8, 16, 32)
CARDS_GIB = {"T4": 14.7, "A100": 79.1, "H100": 79.1}

_WIDE = {"width": "auto", "max_width": "560px"}
_LABEL = {"description_width": "90px"}
# In the page alone, so that a click may write to the clipboard; the older way where that is not allowed.
_COPY = """
<button class="jupyter-button widget-button" style="width:auto" onclick="
    const area = this.closest('.widget-vbox').querySelector('textarea'), status = this.nextElementSibling;
    const copied = done => { status.textContent = done ? 'copied: paste it into a cell' : 'press Ctrl+C to copy' };
    const select = () => { area.focus(); area.select(); copied(document.execCommand('copy')) };
    navigator.clipboard ? navigator.clipboard.writeText(area.value).then(() => copied(true), select) : select();
">copy as a %%finetune cell</button> <span role="status"></span>
"""


class PlannerWidget(Twinned):
    """The plan for the options at the sliders.

    Args:
        what_if: makes the plans.
        most_gib: the right end of the memory slider, "all that is usable".
    """

    def __init__(self, what_if: WhatIf, most_gib: float) -> None:
        self._what_if, self._most_gib = what_if, most_gib
        given = what_if.options
        self._values = {
            "max_length": given.get("max_length", 1024),
            "lora_r": given.get("lora_r", 16),
            "per_device_train_batch_size": given.get("per_device_train_batch_size"),
            "vram_gib": given.get("vram_gib"),
        }
        self.fit = self._answer()

    def build(self) -> Any:
        """Sliders, the plan, the cell."""
        values = self._values
        gib = min(self._most_gib, values["vram_gib"] or self._most_gib)
        self.max_length = _slider("max_length", _with(LENGTHS, values["max_length"]))
        self.lora_r = _slider("lora_r", _with(RANKS, values["lora_r"]))
        self.batch = _slider("rows at once", _with(BATCHES, values["per_device_train_batch_size"] or "auto"))
        self.vram_gib = w.FloatSlider(
            description="vram_gib", min=min(0.1, gib), max=self._most_gib, step=0.1, readout_format=".1f",
            value=gib, continuous_update=False, layout=_WIDE, style=_LABEL,
        )  # fmt: skip
        self._page, self._cell = w.HTML(), w.Textarea(rows=8, layout={"width": "auto"})
        sliders = [self.max_length, self.lora_r, self.batch, self.vram_gib]
        for slider in sliders:
            slider.observe(self._moved, names="value")
        self._show(_html(self.fit))
        return w.VBox([*sliders, self._page, w.HTML(_COPY), self._cell], layout={"max_width": "900px"})

    @property
    def options(self) -> dict[str, Any]:
        """The options as they stand: those given, and what the sliders say."""
        return {k: v for k, v in {**self._what_if.options, **self._values}.items() if v is not None}

    @property
    def cell(self) -> str:
        """They as a ``%%finetune`` cell."""
        return cell_text(self.options)

    def move(self, **values: Any) -> None:
        """Plan with other values of ``max_length``, ``lora_r``, ``per_device_train_batch_size`` and ``vram_gib``.

        Raises:
            ConfigError, ModelError, DataError: as :func:`planner_widget`.
        """
        self._values |= values
        self.fit = self._answer()

    def twin(self) -> dict[str, Any]:
        """The plan at the sliders, and the cell."""
        text = f"{_text(self.fit)}\n\n{self.cell}"
        return {"text/plain": text, "text/html": f"{_html(self.fit)}<pre>{escape(self.cell)}</pre>"}

    def __repr__(self) -> str:
        return f"PlannerWidget({self.fit!r})"

    def _answer(self) -> FitReport:
        fit = self._what_if(**self._values)
        if self.shown:
            self._show(_html(fit))
        return fit

    def _moved(self, _: Any) -> None:
        batch, gib = self.batch.value, round(self.vram_gib.value, 2)
        try:
            self.move(
                max_length=self.max_length.value,
                lora_r=self.lora_r.value,
                per_device_train_batch_size=None if batch == "auto" else batch,
                vram_gib=gib if gib < self._most_gib - 0.05 else None,
            )
        except NbqloraError as error:
            self._show(f"<pre>{escape(str(error))}</pre>")

    def _show(self, page: str) -> None:
        # Widgets' own line height is that of a control.
        self._page.value, self._cell.value = f'<div style="line-height:1.4">{page}</div>', self.cell


def planner_widget(model: str, data: Any = None, *, card: str | None = None, **options: Any) -> PlannerWidget:
    """Sliders for length, rank, batch and memory, with the plan that they make, and the cell to run it.

    Args:
        model: a hub id, a folder, or ``"demo"``; its weights are not read.
        data: as in a ``%%finetune`` cell; None assumes full rows.
        card: plan for a ``"T4"``, ``"A100"`` or ``"H100"`` in this machine's host.
        **options: more options of a ``%%finetune`` cell.

    Raises:
        ConfigError, ModelError, DataError: as :func:`nbqlora.plan`.

    Example:
        >>> nbqlora.planner_widget("demo", "demo")
    """
    register_all()
    given = {"model": model, **({} if data is None else {"data": data}), **options}
    device = None if card is None else _card(card)
    what_if = WhatIf(given, device)
    there = what_if.device.free_bytes + (what_if.device.context_bytes if what_if.device.kind == "cpu" else 0)
    return PlannerWidget(what_if, round(there / GIB, 1))


def _card(name: str) -> DeviceSpec:
    if name not in CARDS_GIB:
        message = f"expected one of {', '.join(CARDS_GIB)}, got {name!r}"
        raise ConfigError([Problem(key="card", message=message, hint="leave it out to plan for this machine")])
    n_bytes = int(CARDS_GIB[name] * GIB)
    return replace(
        device_of(name),
        total_bytes=n_bytes,
        free_bytes=n_bytes,
        host_free_bytes=read_host().free_bytes,
        disk_free_bytes=disk_free_bytes("."),
    )


def cell_text(options: Mapping[str, Any], name: str = "run1") -> str:
    """Options as a ``%%finetune`` cell; data that lives in the notebook by its variable's name."""
    plain = {k: v for k, v in options.items() if k not in ("trl", "peft")}
    lines = [f"%%finetune {name}", *(f"{k} = {_toml(v)}" for k, v in plain.items())]
    if "data" not in options:
        lines.append("data = ")
    for table in ("trl", "peft"):
        if options.get(table):
            lines += [f"[{table}]", *(f"{k} = {_toml(v)}" for k, v in options[table].items())]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """A value as TOML spells it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (str, bool, int, float)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value) and value:
        return json.dumps(list(value), ensure_ascii=False)
    return json.dumps(f"${_variable(value)}")


def _variable(value: Any) -> str:
    """What the notebook calls an object."""
    shell = get_ipython()
    names = {} if shell is None else shell.user_ns
    return next((k for k, v in names.items() if v is value and not k.startswith("_")), "rows")


def _text(fit: FitReport) -> str:
    return str(fit.plan) if fit.plan is not None else "\n".join(["it does not fit", *fit.lines])


def _html(fit: FitReport) -> str:
    if fit.plan is not None:
        return fit.plan._repr_html_() or ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in fit.lines)
    return f'<p role="alert"><strong>✗ it does not fit</strong></p><ul style="margin:2px 0">{lines}</ul>'


def _slider(name: str, given: tuple[tuple[Any, ...], Any]) -> Any:
    options, value = given
    return w.SelectionSlider(
        description=name, options=[(str(o), o) for o in options], value=value, continuous_update=False,
        layout=_WIDE, style=_LABEL,
    )  # fmt: skip


def _with(options: tuple[Any, ...], value: Any) -> tuple[tuple[Any, ...], Any]:
    """The steps of a slider, with the value among them."""
    if value in options:
        return options, value
    numbers = sorted([*(o for o in options if o != "auto"), value])
    return (*(o for o in options if o == "auto"), *numbers), value
