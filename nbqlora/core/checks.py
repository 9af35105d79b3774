"""Checks of single option values: each returns what is wrong, or ``""``.

Kept apart from the list of options so that the list reads as a list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from nbqlora.core.specs import LayerPolicy

Check = Callable[[Any], str]

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_8bit")


def _shown(value: Any) -> str:
    """A value as TOML writes it, short."""
    if isinstance(value, Mapping) and value:
        return "a table"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a huge number"
    written = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    if len(written) <= 40 and "\n" not in written:
        return written
    if isinstance(value, str):
        return "long text"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


_PLAIN = re.compile(r"true|false|[+-]?\d{1,20}(\.\d{1,20})?(e[+-]?\d+)?")


def _unquoted(value: Any) -> str:
    """:func:`_shown`; text that would be a fitting value without its quotes says so."""
    word = isinstance(value, str) and _PLAIN.fullmatch(value.strip().lower())
    return _shown(value) + ("; leave out the quotes" if word else "")


def optional(check: Check) -> Check:
    """None, or what ``check`` accepts."""
    return lambda value: "" if value is None else check(value)


def text(value: Any) -> str:
    """A non-empty string."""
    return "" if isinstance(value, str) and value.strip() else f"expected text, got {_shown(value)}"


def boolean(value: Any) -> str:
    """True or false."""
    return "" if isinstance(value, bool) else f"expected true or false, got {_unquoted(value)}"


def auto_or_boolean(value: Any) -> str:
    """``auto``, true or false."""
    fine = isinstance(value, bool) or value == "auto"
    return "" if fine else f'expected "auto", true or false, got {_shown(value)}'


# What transformers took as ``fsdp`` before it became true or false.
_ELSEWHERE = {"full_shard", "shard_grad_op", "hybrid_shard", "hybrid_shard_zero2", "no_shard", "offload", "auto_wrap"}


def whole_or_split(value: Any) -> str:
    """``auto``, true or false; what transformers' own option takes beside these leads to true or false."""
    message = auto_or_boolean(value)
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not message or not isinstance(words, (list, tuple)) or not words or not set(map(str, words)) <= _ELSEWHERE:
        return message
    if "no_shard" in words:
        return f"{message}; false keeps the whole model on each card"
    return f"{message}; true splits the NF4 weights of each layer over the cards, and nothing else"


def one_of(*names: str) -> Check:
    """One of ``names``."""

    def check(value: Any) -> str:
        if isinstance(value, str) and value in names:
            return ""
        close = get_close_matches(str(value).lower(), names, n=1)
        return f"expected one of {', '.join(names)}, got {_shown(value)}" + (
            f"; did you mean {close[0]}?" if close else ""
        )

    return check


def integer(*, at_least: int, at_most: int | None = None) -> Check:
    """A whole number from ``at_least``; true and false are not numbers."""
    upto = f" and at most {at_most}" if at_most is not None else ""

    def check(value: Any) -> str:
        fine = isinstance(value, int) and not isinstance(value, bool) and value >= at_least
        fine = fine and (at_most is None or value <= at_most)
        return "" if fine else f"expected a whole number of at least {at_least}{upto}, got {_unquoted(value)}"

    return check


def number(*, above: float | None = None, at_least: float | None = None, below: float | None = None) -> Check:
    """A finite number within the bounds."""
    bounds = [f"above {above:g}"] if above is not None else []
    bounds += [f"of at least {at_least:g}"] if at_least is not None else []
    bounds += [f"below {below:g}"] if below is not None else []

    def check(value: Any) -> str:
        fine = isinstance(value, (int, float)) and not isinstance(value, bool)
        fine = fine and (isinstance(value, int) or isfinite(value))
        fine = fine and (above is None or value > above) and (at_least is None or value >= at_least)
        fine = fine and (below is None or value < below)
        return "" if fine else f"expected a number {' and '.join(bounds)}, got {_unquoted(value)}"

    return check


def steps(value: Any) -> str:
    """A number of steps, or -1 for none."""
    fine = isinstance(value, int) and not isinstance(value, bool) and (value == -1 or value >= 1)
    return "" if fine else f"expected a whole number of at least 1, or -1 for whole epochs, got {_shown(value)}"


def how_many_cards(value: Any) -> str:
    """A number of cards, or ``all``."""
    if isinstance(value, str) and value == "all":
        return ""
    fine = not integer(at_least=1)(value)
    return "" if fine else f'expected a whole number of at least 1 or "all", got {_shown(value)}'


def rows_source(value: Any) -> str:
    """Something that may hold rows; what is in it is looked at later."""
    if isinstance(value, str):
        return text(value)
    if value is None or isinstance(value, (bool, int, float, bytes)):
        return f"expected a file, a data set's name or rows, got {_shown(value)}"
    return ""


def optimizer(value: Any) -> str:
    """An optimizer whose memory the plan knows."""
    if isinstance(value, str) and value.startswith("paged_"):
        return "paged optimizers keep their states in managed memory, which no plan can bound; use adamw_8bit"
    return one_of(*OPTIMIZERS)(value)


def module_names(value: Any) -> str:
    """A name, or several."""
    names = [value] if isinstance(value, str) else value
    fine = isinstance(names, (list, tuple)) and names and all(isinstance(n, str) and n for n in names)
    return "" if fine else f"expected a name or a list of names, got {_shown(value)}"


def table(value: Any) -> str:
    """A TOML table."""
    return "" if isinstance(value, Mapping) else f"expected a table, got {_shown(value)}"


def layer_policies(value: Any) -> str:
    """``auto``, ``none``, ``full``, ``offload``, true, false, or layers by policy."""
    if isinstance(value, bool) or (isinstance(value, str) and value in ("auto", "none", "full", "offload")):
        return ""
    if isinstance(value, Mapping) and value:
        known = [policy.value for policy in LayerPolicy]
        unknown = [k for k in value if k not in known]
        if unknown:
            return f"expected layers by policy ({', '.join(known)}), got {unknown[0]}"
        return next((m for m in map(integer(at_least=0), value.values()) if m), "")
    return f'expected "auto", "none", "full", "offload" or a table {{keep = 22, recompute = 10}}, got {_shown(value)}'


# Types of a library's settings that TOML can say, with how they are called here.
_KINDS: Mapping[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    list: ((Sequence,), "a list"),
    dict: ((Mapping,), "a table"),
}


def of_type(annotation: Any) -> Check:
    """What an annotation says that is made of these types; one that says more is left to the library."""
    union = get_origin(annotation) in (Union, UnionType)
    parts = [p for p in (get_args(annotation) if union else (annotation,)) if p is not NoneType]
    kinds = [get_origin(part) or part for part in parts]
    if not all(kind in _KINDS for kind in kinds):
        return lambda value: ""
    words = " or ".join(_KINDS[kind][1] for kind in kinds)

    def check(value: Any) -> str:
        fine = any(_is_of(value, kind) for kind in kinds) or value is None
        return "" if fine else f"expected {words}, got {_unquoted(value)}"

    return check


def _is_of(value: Any, kind: Any) -> bool:
    """True and false are no numbers, and text is no list."""
    if isinstance(value, (bool, str)):
        return kind is type(value)
    return isinstance(value, _KINDS[kind][0])
