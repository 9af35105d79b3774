"""What a notebook keeps by itself: the last error and the results of cells, found in every place and let go of.

After an error ``sys.last_*`` and IPython's traceback formatter both hold its frames, and with them every local of every
function on the way; a debugger that was opened holds them once more. A cell's last value is held by ``_``, ``__``,
``___``, ``_5``, ``Out``, IPython's copies of these and the record of the last execution. Clearing one of the places
frees nothing, so all are cleared together. Measured on IPython 7.34 and 9.18.

A user's variable is never touched: a name counts as automatic only while it still is what IPython put there. Frames are
not cleared either: an error that a variable keeps stays whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

UNDERSCORES = ("_", "__", "___")
_LAST = ("last_exc", "last_value", "last_traceback", "last_type")
_ERRORS = ("error_in_exec", "error_before_exec")
_FRAMES = ("botframe", "stopframe", "returnframe", "curframe", "curframe_locals")


def outputs(shell: Any) -> dict[str, Any]:
    """Results that IPython keeps, by the name that a cell writes: ``Out[5]``, ``_``.

    Args:
        shell: an IPython shell.
    """
    found = {f"Out[{n}]": value for n, value in dict(shell.user_ns.get("_oh", {})).items()}
    for name in UNDERSCORES:
        for value in (shell.user_ns_hidden.get(name), getattr(shell.displayhook, name, None)):
            if value is not None and not _is_empty(value):
                found[name] = value
    for record in _records(shell):
        if record.result is not None and not any(record.result is value for value in found.values()):
            found["the last result"] = record.result
    return found


def drop_outputs(shell: Any) -> tuple[str, ...]:
    """Let go of them; the names that held something."""
    found = outputs(shell)
    own, hidden, hook = shell.user_ns, shell.user_ns_hidden, shell.displayhook
    for n, value in list(own.get("_oh", {}).items()):
        for names in (own, hidden):
            if names.get(f"_{n}") is value:
                del names[f"_{n}"]
    for name in UNDERSCORES:
        if name in own and any(own[name] is kept for kept in (hidden.get(name), getattr(hook, name, None))):
            own[name] = ""
        if name in hidden:
            hidden[name] = ""
        if hasattr(hook, name):
            setattr(hook, name, "")
    own.get("_oh", {}).clear()
    for record in _records(shell):
        record.result = None
    return tuple(found)


def errors(shell: Any) -> list[Any]:
    """Errors, tracebacks and frames that Python and IPython keep of what failed last."""
    found = [getattr(sys, name, None) for name in _LAST[:-1]]
    for formatter in _formatters(shell):
        found += [getattr(formatter, name, None) for name in ("tb", "last_syntax_error")]
    for record in _records(shell):
        found += [getattr(record, name, None) for name in _ERRORS]
    for debugger in _debuggers(shell):
        found += [vars(debugger).get(name) for name in (*_FRAMES, "stack", "_chained_exceptions")]
    return [x for x in found if x is not None and not isinstance(x, str)]


def drop_errors(shell: Any) -> tuple[str, ...]:
    """Let go of them; the error's name, where there was one."""
    last = getattr(sys, "last_value", None)
    names = (type(last).__name__,) if last is not None else ()
    for name in _LAST:
        if hasattr(sys, name):
            delattr(sys, name)
    for formatter in _formatters(shell):
        for name in ("tb", "last_syntax_error"):
            if hasattr(formatter, name):
                setattr(formatter, name, None)
    for record in _records(shell):
        for name in _ERRORS:
            setattr(record, name, None)
    for debugger in _debuggers(shell):
        debugger.forget()
        for name in _FRAMES:
            if name in vars(debugger):
                setattr(debugger, name, None)
        if "_chained_exceptions" in vars(debugger):
            debugger._chained_exceptions = ()
    return names


def _is_empty(value: Any) -> bool:
    return isinstance(value, str) and not value


def _formatters(shell: Any) -> Iterator[Any]:
    for name in ("InteractiveTB", "SyntaxTB"):
        if hasattr(shell, name):
            yield getattr(shell, name)


def _records(shell: Any) -> Iterator[Any]:
    """What IPython remembers of the last execution and of the one under way."""
    for record in (shell.last_execution_result, getattr(shell.displayhook, "exec_result", None)):
        if record is not None:
            yield record


def _debuggers(shell: Any) -> Iterator[Any]:
    for formatter in _formatters(shell):
        if getattr(formatter, "pdb", None) is not None:
            yield formatter.pdb
