"""Base and tuned model side by side: the same words, the same draws, each answer shown while it is made.

The base answers first, then the tuned model: one model is loaded, and the adapter is switched. Answers come while the
button's callback runs, so a cell that is run meanwhile waits, and ■ ends the answer. What was asked stays listed below
and is the twin, a :class:`~nbqlora.core.report.Comparison`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from time import monotonic
from typing import Any

import ipywidgets as w

from nbqlora.core.errors import NbqloraError
from nbqlora.core.report import Comparison
from nbqlora.notebook.twin import Twinned
from nbqlora.run import Run
from nbqlora.run.talking import answer
from nbqlora.view import register_all

# An answer is sent again at most so often.
_SECONDS = 0.25
_WIDE = {"width": "auto", "max_width": "560px"}
_LABEL = {"description_width": "110px"}
_PANEL = (
    "border:1px solid rgba(128,128,128,.6);border-radius:3px;padding:4px 8px;min-height:48px;"
    "line-height:1.4;white-space:pre-wrap"
)


class CompareWidget(Twinned):
    """A prompt, and two answers.

    Args:
        run: a finished run; its model is loaded when it is first asked.
        seed, temperature, max_new_tokens: where the controls begin.
    """

    def __init__(self, run: Run, *, seed: int, temperature: float, max_new_tokens: int) -> None:
        self._run, self._rows = run, list[tuple[str, str, str]]()
        self._turns: dict[bool, list[dict[str, str]]] = {False: [], True: []}
        self._settings: dict[str, Any] = {"seed": seed, "temperature": temperature, "max_new_tokens": max_new_tokens}

    def build(self) -> Any:
        """Prompt, settings, both answers, and all that was asked."""
        begin = self._settings
        self.prompt = w.Textarea(placeholder="ask both", rows=3, layout={"width": "auto"})
        self.seed = w.BoundedIntText(description="seed", value=begin["seed"], max=2**31 - 1, layout=_WIDE, style=_LABEL)
        self.temperature = w.FloatSlider(
            description="temperature", value=begin["temperature"], max=2.0, step=0.1, layout=_WIDE, style=_LABEL
        )
        self.max_new_tokens = w.IntSlider(
            description="tokens at most", value=begin["max_new_tokens"], min=8, max=1024, step=8, layout=_WIDE,
            style=_LABEL,
        )  # fmt: skip
        self.go_on = w.Checkbox(description="go on with the conversation", value=False, indent=False)
        self.ask = w.Button(description="ask both", button_style="primary", icon="play")
        self.ask.on_click(self._asked)
        self._panels = {tuned: w.HTML(layout={"flex": "1 1 260px", "min_width": "240px"}) for tuned in (False, True)}
        self._status, self._table = w.HTML(), w.HTML()
        for tuned in (False, True):
            self._show(tuned, self._rows[-1][1 + tuned] if self._rows else "")
        self._list()
        both = w.HBox(list(self._panels.values()), layout={"flex_flow": "row wrap", "grid_gap": "8px"})
        controls = [self.prompt, self.seed, self.temperature, self.max_new_tokens, self.go_on, self.ask]
        return w.VBox([*controls, self._status, both, self._table], layout={"max_width": "900px"})

    @property
    def comparison(self) -> Comparison:
        """Everything that was asked here."""
        return Comparison(rows=tuple(self._rows))

    def twin(self) -> dict[str, Any]:
        """What was asked so far, as a table."""
        if not self._rows:
            text = f"{self._run.name}: nothing was asked yet; .answer(text) asks both models"
            return {"text/plain": text, "text/html": f"<p>{escape(text)}</p>"}
        return {"text/plain": str(self.comparison), "text/html": self.comparison._repr_html_() or ""}

    def __repr__(self) -> str:
        return f"CompareWidget({self._run.name}, {self.comparison!r})"

    def answer(self, prompt: str, *, go_on: bool = False) -> None:
        """Ask both models, as the button does.

        Args:
            go_on: the prompt goes on with the conversation of the last one.

        Raises:
            RunError: the run saved no adapter.
        """
        if not go_on:
            self._turns = {False: [], True: []}
        base, tuned = (self._answered(which, prompt) for which in (False, True))
        self._rows.append((prompt, base, tuned))
        if self.shown:
            self._list()

    def _answered(self, tuned: bool, prompt: str) -> str:
        sent = monotonic()

        def so_far(text: str) -> None:
            nonlocal sent
            if self.shown and monotonic() - sent >= _SECONDS:
                self._show(tuned, text, busy=True)
                sent = monotonic()

        messages = [*self._turns[tuned], {"role": "user", "content": prompt}]
        said = answer(self._run, messages, so_far, tuned=tuned, **self._settings)
        self._turns[tuned] = [*messages, {"role": "assistant", "content": said}]
        if self.shown:
            self._show(tuned, said)
        return said

    def _asked(self, _: Any) -> None:
        prompt = self.prompt.value.strip()
        if not prompt:
            self._status.value = "<em>write something to ask first</em>"
            return
        self.ask.disabled, self._status.value = True, "<em>answering; ■ ends it</em>"
        self._settings = {
            "seed": self.seed.value,
            "temperature": round(self.temperature.value, 2),
            "max_new_tokens": self.max_new_tokens.value,
        }
        for tuned in (False, True):
            self._show(tuned, "", busy=True)
        try:
            self.answer(prompt, go_on=self.go_on.value)
            self._status.value = ""
        except NbqloraError as error:
            self._status.value = f'<pre role="alert">{escape(str(error))}</pre>'
        except KeyboardInterrupt:
            self._status.value = "<em>interrupted</em>"
        finally:
            self.ask.disabled = False

    def _list(self) -> None:
        table = f'<div style="line-height:1.4">{self.comparison._repr_html_()}</div>'
        self._table.value = f"<details><summary>all {len(self._rows)}</summary>{table}</details>" if self._rows else ""

    def _show(self, tuned: bool, text: str, *, busy: bool = False) -> None:
        title = "tuned" if tuned else "base"
        body = escape(text) + (" ▌" if busy else "")
        self._panels[tuned].value = f'<strong>{title}</strong><div aria-live="polite" style="{_PANEL}">{body}</div>'


def compare_widget(
    run: Run,
    prompts: str | Sequence[str] = (),
    *,
    seed: int = 0,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
) -> CompareWidget:
    """Talk to a run's base and tuned model side by side.

    Args:
        run: what ``%%finetune`` bound.
        prompts: asked at once, before anything is shown.
        seed: of both answers' draws.
        temperature: 0 for greedy.
        max_new_tokens: where an answer is cut.

    Raises:
        RunError: there are prompts, and the run saved no adapter.

    Example:
        >>> nbqlora.compare_widget(run1, "Why is the sky blue?")
    """
    register_all()
    widget = CompareWidget(run, seed=seed, temperature=temperature, max_new_tokens=max_new_tokens)
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        widget.answer(prompt)
    return widget
