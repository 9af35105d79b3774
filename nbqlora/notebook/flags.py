"""The line behind a magic: its flags, and errors in the form of every other error of a cell.

IPython's ``UsageError`` would let test runners pass the cell in silence.
"""

from __future__ import annotations

from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic_arguments import parse_argstring

from nbqlora.core.errors import ConfigError, Problem


def parsed(magic: Any, line: str, name: str) -> Any:
    """The line's flags; a comment behind them is legal, as it is in a cell's body.

    Raises:
        ConfigError: a flag that does not exist, or a value that it does not take.
    """
    try:
        return parse_argstring(magic, line.split("#", 1)[0])
    except UsageError as error:
        reason = str(error).strip().splitlines()[-1]
        raise wrong_line(name, reason, f"{name}? lists what it takes") from None


def wrong_line(name: str, message: str, hint: str) -> ConfigError:
    """An error about a magic's line."""
    return ConfigError([Problem(key=name, message=message, hint=hint)], "line 1")
