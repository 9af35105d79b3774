"""``%%finetune``: parse, call, display; ``%vram`` stands beside it, in :mod:`nbqlora.notebook.vram`.

Options are declared with ``magic_arguments``, so ``%%finetune?`` documents itself.
"""

from __future__ import annotations

import builtins
import keyword
import os
import re
from typing import Any, NoReturn

from IPython.core.magic import Magics, cell_magic, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from nbqlora.core.errors import NbqloraError
from nbqlora.core.request import CellRequest, parse_toml
from nbqlora.notebook.cell import put_magic_first
from nbqlora.notebook.flags import parsed, wrong_line
from nbqlora.notebook.vram import VramMagics

_CELL = "%%finetune"


def register(shell: Any) -> None:
    """Add the magics to a shell, however often this is called."""
    shell.register_magics(NbqloraMagics, VramMagics)
    put_magic_first(shell)


def _check_name(name: str) -> str:
    if not _is_free(name):
        words = re.sub(r"\W+", "_", name.removeprefix("name=")).strip("_")
        fitting = words if _is_free(words) else "run1"
        raise wrong_line(_CELL, f"{name!r} cannot be a variable's name", f"write {_CELL} {fitting}")
    return name


def _is_free(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name) and not hasattr(builtins, name)


def _check_not_data(name: str, request: CellRequest) -> None:
    """The run must not take the place of the rows that it is made from."""
    if f"${name}" in request.mapping:
        message = f"{name} is an object that this cell reads, and the run would replace it"
        raise wrong_line(_CELL, message, "give the run another name")


@magics_class
class NbqloraMagics(Magics):
    """The magics of nbqlora."""

    @magic_arguments()
    @argument("name", nargs="?", default="run1", help="the variable that the Run is bound to, and its folder in runs/")
    @argument("--plan", action="store_true", help="say what would be done and why; nothing is loaded")
    @argument("--resume", action="store_true", help="go on from the run's furthest checkpoint, if it has one")
    @argument("--static", action="store_true", help="no live output: the plan, then the result")
    @argument("--traceback", action="store_true", help="show an error's whole traceback")
    @cell_magic("finetune")
    def finetune(self, line: str, cell: str) -> None:
        """Fine-tune a model with QLoRA; the body is TOML: ``key = value``, comments with ``#``."""
        flags = parsed(self.finetune, line, _CELL)
        try:
            name = _check_name(flags.name)
            request = parse_toml(cell, first_line=2, source="this cell", namespace=self.shell.user_ns)
            _check_not_data(name, request)
            done = _plan(request, name) if flags.plan else _run(request, name, flags.static, flags.resume)
            self.shell.user_ns[name] = done
        except NbqloraError as error:
            error.show_traceback = flags.traceback
            raise

    # What IPython makes of them is a UsageError, which test runners pass over.
    @line_magic("finetune")
    def with_one_sign(self, line: str) -> NoReturn:
        """For a cell: write ``%%finetune`` on its first line, and the options below."""
        raise wrong_line("%finetune", "one % is for a line, and this is for a cell", f"write {_CELL} {line}".rstrip())

    @line_magic("%finetune")
    def below_code(self, line: str) -> NoReturn:
        """For a cell of its own: code stands above it."""
        raise wrong_line(_CELL, "stands below code", "put what is above it into a cell of its own")


def _plan(request: CellRequest, name: str) -> Any:
    from nbqlora import api
    from nbqlora.core.events import DataEvent, Event
    from nbqlora.notebook.live import show

    def observe(event: Event) -> None:
        if isinstance(event, DataEvent):
            show(event.report)

    plan = api.plan_request(request, name=name, observe=observe)
    show(plan)
    return plan


def _run(request: CellRequest, name: str, static: bool, resume: bool) -> Any:
    from nbqlora import api
    from nbqlora.core.display import is_static
    from nbqlora.notebook.live import LiveView

    view = LiveView(name, static=is_static(os.environ, static))
    try:
        result = api.finetune_request(request, name=name, observe=view, resume=resume)
    except BaseException:
        view.fail()
        raise
    view.finish(result)
    return result
