"""The steps and evaluations of a run as a checkpoint keeps them: a few numbers each, under names given once.

A run of 10,000 steps is 1 MB. Figures are kept exactly; one that is not finite (the norm of a step that
fp16 threw away) is kept as text, since JSON has no word for it. Notes, phases and stops belong to the
session that they happened in and are not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from math import isfinite
from typing import Any

from nbqlora.core.events import EvalEvent, Event, StepEvent

KINDS: Mapping[str, type[StepEvent] | type[EvalEvent]] = {"step": StepEvent, "eval": EvalEvent}


def pack_events(events: Iterable[Event]) -> dict[str, Any]:
    """Steps and evaluations for JSON, in order; everything else is left out."""
    names = {kind: [f.name for f in fields(of)] for kind, of in KINDS.items()}
    rows = [
        [kind, *(_packed(getattr(event, name)) for name in names[kind])]
        for event in events
        for kind, of in KINDS.items()
        if type(event) is of
    ]
    return {"fields": names, "rows": rows}


def unpack_events(packed: Mapping[str, Any]) -> tuple[Event, ...]:
    """Undo of :func:`pack_events`. Raises ``KeyError`` or ``TypeError`` for fields that these events do not have."""
    events = []
    for kind, *values in packed["rows"]:
        named = zip(packed["fields"][kind], values, strict=True)
        events.append(KINDS[kind](**{name: _unpacked(value) for name, value in named}))
    return tuple(events)


def _packed(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _unpacked(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
