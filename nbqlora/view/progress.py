"""A run in progress: events in, one line and one block of charts out.

Pure: it is fed events, figures and the time, and asked for its picture, so live views, tests and static pages share
it. The line is small enough to be sent every second (``STATUS_BYTES``, text and HTML together), the block is sent
when it is worth its bytes (12 kB at most, whatever the run's length).
"""

from __future__ import annotations

from html import escape

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
from nbqlora.core.specs import BatchLayout
from nbqlora.core.units import format_bytes, format_minutes, format_seconds
from nbqlora.view.run_charts import loss_chart, memory_chart

PHASES = {
    "look": "looking at model, data and machine",
    "load": "loading",
    "train": "training",
    "stop": "stopping",
    "save": "saving",
    "copy": "copying",
}
STATUS_BYTES = 290  # with what a message puts around it, at most 400
STOPS = "■ stops after this step and saves; a second ■ drops the step"
_LISTED, _CHARACTERS = 4, 180
_TAGS_BYTES, _NAME_BYTES = 50, 20


class Progress:
    """What is known of a run so far; times are seconds since the view began."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.plan: Plan | None = None
        self.phase, self.note = "starting", ""
        self.fill: float | None = None
        self.steps: list[StepEvent] = []
        self.evals: list[EvalEvent] = []
        self.saves: list[SavedEvent] = []
        self.ooms: list[tuple[float, OomEvent]] = []
        self.phases: list[tuple[float, str]] = []
        self.memory: list[tuple[float, float]] = []
        self.peaks: list[tuple[float, float]] = []
        self.now = 0.0
        self.shift = 0.0

    def take(self, event: Event, at: float | None = None) -> None:
        """Account for one event that came ``at`` this time; None for the event's own."""
        self.now = event.elapsed_seconds if at is None else at
        self.shift = event.elapsed_seconds - self.now
        match event:
            case DataEvent():
                self.fill = event.report.fill
            case PlannedEvent():
                self.plan = event.plan
            case PhaseEvent():
                self.phase = f"{PHASES.get(event.phase, event.phase)} {event.detail}".rstrip()
                self.phases.append((self.now, event.phase))
            case StepEvent():
                self.steps.append(event)
                self.peaks.append((self.now, float(event.peak_bytes)))
            case EvalEvent():
                self.evals.append(event)
            case OomEvent():
                self.ooms.append((self.now, event))
            case NoteEvent():
                self.note = event.text
            case SavedEvent():
                self.saves.append(event)
            case StoppedEvent():
                self.note = f"stopped after step {event.step}: {event.reason}"

    def sample(self, at: float, n_bytes: int | None) -> None:
        """Account for the time, and for the memory in use then where it is known."""
        self.now = at
        if n_bytes is not None:
            self.memory.append((at, float(n_bytes)))

    @property
    def share(self) -> float:
        """Steps done, 0 to 1."""
        return self.steps[-1].step / self.steps[-1].total_steps if self.steps else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds of training still to come, from the steps so far; the first one, a warm-up, counts only alone."""
        if not self.steps:
            return None
        counted = self.steps[1:] or self.steps
        mean = sum(e.seconds for e in counted) / len(counted)
        since = self.now - self.peaks[-1][0]
        return max(0.0, mean * (self.steps[-1].total_steps - self.steps[-1].step) - since)

    @property
    def _trains(self) -> bool:
        return self.phase.startswith(PHASES["train"])

    def figures(self) -> list[str]:
        """The numbers of the last step, each with its word."""
        if not self.steps:
            return []
        last = self.steps[-1]
        rate = last.n_tokens / last.seconds if last.seconds else 0.0
        words = [f"step {last.step}/{last.total_steps}", f"loss {last.loss:.3f}"]
        words += [f"eval {self.evals[-1].loss:.3f}"] if self.evals else []
        left = self._trains and last.step < last.total_steps and self.eta_seconds
        words += [f"{format_minutes(left)} left"] if left else []
        return [*words, f"{rate:,.0f} tokens/s", f"peak {format_bytes(last.peak_bytes)}"]

    def text(self) -> str:
        """The line: what goes on, and the numbers; a note where there are none yet."""
        took = f"{self.now:.0f} s" if self.now < 60 else format_seconds(self.now)
        training = self.steps and self._trains
        head = f"{_cut(self.name, _NAME_BYTES)}: {PHASES['train'] if training else self.phase}"
        return self._fitted(head, [*(self.figures() or ([self.note] if self.note else [])), took])

    def html(self) -> str:
        """The same with a bar."""
        last = self.steps[-1] if self.steps else None
        bar = f"<progress value={last.step} max={last.total_steps}></progress> " if last else ""
        return f"{bar}{escape(self.text(), quote=False)}"

    def _fitted(self, head: str, words: list[str]) -> str:
        """The head and as many of the words as there is room for; the first one is cut rather than left out."""
        room = (STATUS_BYTES - _TAGS_BYTES) // 2
        line = _cut(" · ".join([head, *words[:1]]), room)
        for word in words[1:]:
            longer = f"{line} · {word}"
            line = longer if _size(longer) <= room else line
        return line

    def facts(self) -> list[str]:
        """What stands below the charts, line by line."""
        words = []
        if self.fill is not None and self.plan is not None:
            what = "padding" if self.plan.data.layout is BatchLayout.PADDED else "packing"
            words.append(f"{what}: {100 * self.fill:.1f} % of the positions are tokens of rows")
        if self.saves:
            steps = sorted({e.step for e in self.saves})
            words.append(f"▼ saved after step {', '.join(map(str, steps[-_LISTED:]))}; last {self.saves[-1].path}")
        if len(self.ooms) > _LISTED:
            words.append(f"⚠ out of memory {len(self.ooms)} times; the last {_LISTED}:")
        words += [oom_line(e) for _, e in self.ooms[-_LISTED:]]
        words += [self.note] if self.note else []
        words += [STOPS] if self.phase.startswith("training") else []
        return [_cut(w, _CHARACTERS) for w in words]

    def charts_text(self) -> str:
        """The block in words."""
        return "\n".join(f"  {line}" for line in [*self._spoken(), *self.facts()])

    def charts_html(self) -> str:
        """The block: loss and memory beside each other, below each other on a narrow page, then the facts."""
        pictures = "".join(
            f'<figure style="flex:1 1 280px;max-width:480px;margin:4px 0"><figcaption>{title}</figcaption>{picture}'
            f"<div>{legend}</div></figure>"
            for title, _, picture, legend in self._charts()
        )
        lines = "".join(f"<li>{escape(line, quote=False)}</li>" for line in self.facts())
        return (
            '<div style="max-width:980px;font-size:13px"><div style="display:flex;flex-wrap:wrap;gap:0 20px">'
            f'{pictures}</div><ul style="margin:2px 0;padding-left:18px">{lines}</ul></div>'
        )

    def _charts(self) -> list[tuple[str, str, str, str]]:
        """Title, label, picture and legend of each."""
        losses = loss_chart(self.steps, self.evals, self.saves)
        held = memory_chart(self.memory, self.peaks, self.phases, self.ooms, self.plan, self.now)
        return [chart for chart in (losses, held) if chart is not None]

    def _spoken(self) -> list[str]:
        return [label for _, label, _, _ in self._charts()]


def oom_line(event: OomEvent) -> str:
    """``⚠ out of memory in step 3, backward, asking for 1.2 GiB: the loss takes 64 tokens at once``."""
    asked = f", asking for {format_bytes(event.asked_bytes)}" if event.asked_bytes else ""
    return f"⚠ out of memory in step {event.step}, {event.phase}{asked}: {event.action}"


def _size(text: str) -> int:
    """Bytes on the wire: as HTML inside JSON."""
    return len(escape(text, quote=False).replace("\\", "\\\\").replace('"', '\\"').encode())


def _cut(text: str, room: int) -> str:
    text = " ".join(text.split())
    if _size(text) <= room:
        return text
    while _size(text) > room - 3:
        text = text[:-1]
    return f"{text}…"
