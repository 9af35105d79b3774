"""``%%finetune``: parse, call, display; ``%vram`` stands beside it, in :mod:`nbqlora.notebook.vram`.

Options are declared with ``magic_arguments``, so ``%%finetune?`` documents itself.
"""

from __future__ import annotations

import builtins
import keyword
import os
from typing import Any

from IPython.core.magic import Magics, cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from nbqlora.core.errors import ConfigError, NbqloraError, Problem
from nbqlora.core.request import CellRequest, parse_toml
from nbqlora.notebook.flags import parsed
from nbqlora.notebook.vram import VramMagics


def register(shell: Any) -> None:
    """Add the magics to a shell."""
    shell.register_magics(NbqloraMagics, VramMagics)


def _check_name(name: str) -> str:
    if not name.isidentifier() or keyword.iskeyword(name) or hasattr(builtins, name):
        message = f"{name!r} cannot be a variable's name"
        raise ConfigError([Problem(key="%%finetune", message=message, hint="write %%finetune run1")], "line 1")
    return name


def _check_not_data(name: str, request: CellRequest) -> None:
    """The run must not take the place of the rows that it is made from."""
    if f"${name}" in request.mapping:
        message = f"{name} is an object that this cell reads, and the run would replace it"
        raise ConfigError([Problem(key="%%finetune", message=message, hint="give the run another name")], "line 1")


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
        flags = parsed(self.finetune, line, "%%finetune")
        try:
            name = _check_name(flags.name)
            request = parse_toml(cell, first_line=2, source="this cell", namespace=self.shell.user_ns)
            _check_not_data(name, request)
            done = _plan(request, name) if flags.plan else _run(request, name, flags.static, flags.resume)
            self.shell.user_ns[name] = done
        except NbqloraError as error:
            error.show_traceback = flags.traceback
            raise


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
