"""The line behind a magic: its flags, and errors in the form of every other error of a cell.

IPython's ``UsageError`` would let test runners pass the cell in silence.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic_arguments import parse_argstring

from nbqlora.core.errors import ConfigError, Problem

_UNKNOWN = "unrecognized arguments: "


def parsed(magic: Any, line: str, name: str) -> Any:
    """The line's flags; a comment behind them is legal, as it is in a cell's body.

    Raises:
        ConfigError: a flag that does not exist, a value that it does not take, or a quote that is never closed.
    """
    try:
        return parse_argstring(magic, line.split("#", 1)[0])
    except UsageError as error:
        reason = str(error).strip().splitlines()[-1]
        raise wrong_line(name, reason, _hint(magic, reason, name)) from None
    except ValueError:  # of shlex, which cuts the line into words
        raise wrong_line(name, "a quote on this line is never closed", "close it, or leave it out") from None


def wrong_line(name: str, message: str, hint: str) -> ConfigError:
    """An error about a magic's line."""
    return ConfigError([Problem(key=name, message=message, hint=hint)], f"the {name.split()[0]} line")


def _hint(magic: Any, reason: str, name: str) -> str:
    words = reason.removeprefix(_UNKNOWN).split() if reason.startswith(_UNKNOWN) else []
    if not words:
        return f"{name}? lists what it takes"
    is_cell = name.startswith("%%")
    if is_cell and any("=" in word for word in words):
        return "options go on the lines below, one a line"
    known = re.findall(r"--\w+", magic.parser.format_help())
    # One dash, or the long one that an editor makes of two.
    meant = get_close_matches("--" + words[0].lstrip("-\u2013\u2014"), known, n=1, cutoff=0.75)
    if meant:
        return f"did you mean {meant[0]}?"
    if is_cell and words[0].isidentifier():
        return "a run's name is one word"
    return f"{name}? lists what it takes"
