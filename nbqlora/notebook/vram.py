"""``%vram``: memory now, who holds it, what can be given back, and whether a model would fit.

One question a line; each answer is shown and given back as data without tensors. Nothing is imported before it is
needed: the plain ``%vram`` knows neither torch nor the run.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments

from nbqlora.core.display import is_static
from nbqlora.core.request import CellRequest, parse_toml
from nbqlora.notebook.flags import parsed, wrong_line

_QUESTIONS = ("who", "free", "watch", "fit", "cells")
_FIT = "%vram --fit"
_QUOTES = ('"', "'")


@magics_class
class VramMagics(Magics):
    """``%vram``."""

    @magic_arguments()
    @argument("--who", action="store_true", help="name the variables, outputs and other holders, with their GiB")
    @argument("--free", action="store_true", help="let go of the last error, Out, _, finished runs and the cache")
    @argument("--watch", action="store_true", help="keep updating under later cells; ends 2 minutes after the last one")
    @argument("--fit", nargs="+", metavar="MODEL", help="would MODEL fit here? followed by options: max_length=4096")
    @argument("--cells", choices=("on", "off"), help="print delta and peak after each cell; resets torch's peak")
    @argument("--json", action="store_true", help="print the answer as JSON")
    @no_var_expand  # $rows is the object itself, as in a cell's body, and not its text
    @line_magic("vram")
    def vram(self, line: str) -> Any:
        """Show memory now: the card (or RAM), who holds it, RAM and disk; ``r = %vram`` keeps it as data."""
        flags = parsed(self.vram, line, "%vram")
        _check(flags)
        from nbqlora.notebook import meter
        from nbqlora.notebook.shown import shown

        if flags.cells:
            return meter.after_cells(self.shell, on=flags.cells == "on")
        if flags.watch and not is_static(os.environ):
            return meter.watch(self.shell)
        return shown(self.shell, _answer(self.shell, flags), as_json=flags.json)

    @cell_magic("vram")
    def with_two_signs(self, line: str, cell: str) -> NoReturn:
        """For a line: write ``%vram``."""
        hint = f"write %vram {line}".rstrip() + "; %vram --cells on tells what each cell took"
        raise wrong_line("%%vram", "two % are for a cell, and this is for a line", hint)


def _check(flags: Any) -> None:
    """Raise ConfigError for flags that ask for two things."""
    asked = [name for name in _QUESTIONS if getattr(flags, name)]
    if len(asked) > 1:
        names = " and ".join(f"--{name}" for name in asked)
        raise wrong_line("%vram", f"{names} are different questions", "write a line for each")
    if flags.json and asked and asked[0] in ("watch", "cells"):
        raise wrong_line("%vram", f"--{asked[0]} gives no data", "leave out --json")


def _answer(shell: Any, flags: Any) -> Any:
    _register_views()
    if flags.who:
        from nbqlora.memory.holders import who

        return who(shell, _finished())
    if flags.free:
        from nbqlora.memory.holders import free

        return free(shell, _finished(), _collect())
    if flags.fit:
        return _fit(flags.fit[0], flags.fit[1:], shell.user_ns)
    from nbqlora.memory.probe import vram

    return vram()


def _register_views() -> None:
    from nbqlora.view.holders import register_holder_views
    from nbqlora.view.memory import register_memory_views

    register_memory_views()
    register_holder_views()


def _finished() -> Sequence[Any]:
    """Sessions of finished runs; none was made where their module is not loaded."""
    session: Any = sys.modules.get("nbqlora.run.session")
    return () if session is None else session.finished()


def _collect() -> Callable[[], None]:
    """What gives memory back to the card and the system."""
    if "torch" not in sys.modules:
        return _collect_garbage
    from nbqlora.run.session import collect

    return collect


def _collect_garbage() -> None:
    gc.collect()


def _fit(model: str, pairs: Sequence[str], namespace: Mapping[str, Any]) -> Any:
    request = _request(model, pairs, namespace)
    from nbqlora import api

    return api.fit_request(request)


def _request(model: str, pairs: Sequence[str], namespace: Mapping[str, Any]) -> CellRequest:
    """``max_length=4096 dtype=fp16`` as a cell would say it; a value that is no TOML is text."""
    lines = [f"model = {model if model[0] in _QUOTES else json.dumps(model)}"]
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise wrong_line(_FIT, f"{pair!r} is no option", "write key=value without spaces: max_length=4096")
        lines.append(f"{key} = {_toml(value)}")
    request = parse_toml("\n".join(lines), source=_FIT, namespace=namespace)
    problems = tuple(replace(problem, line=None) for problem in request.problems)
    return replace(request, line_of={}, problems=problems)


def _toml(value: str) -> str:
    try:
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return json.dumps(value)
    return value
