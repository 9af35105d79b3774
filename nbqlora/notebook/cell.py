"""A cell's text before IPython reads it: the magic comes first, and something stands below it.

IPython knows a cell magic on the first line only, and refuses one without a body by itself. Both are a ``UsageError``,
which nbval and nbmake pass over in silence. So comments above the magic go below it: they are comments there too, and
every other line keeps the number that the editor shows. A body that is missing becomes an empty one, which is the
magic's own error.
"""

from __future__ import annotations

import re
from typing import Any

# Not ``%%finetune?``, which asks for help.
_OURS = re.compile(r"\s*%%(finetune|vram)(\s.*)?$", re.DOTALL)


def magic_first(lines: list[str]) -> list[str]:
    """The lines of a cell whose first line, comments aside, is a magic of ours, in the order that IPython takes."""
    at = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), None)
    if at is None or not _OURS.match(lines[at]) or "?" in lines[at].rstrip()[-2:]:
        return lines
    return [lines[at], *([*lines[:at], *lines[at + 1 :]] or ["\n"])]


def put_magic_first(shell: Any) -> None:
    """Let :func:`magic_first` look at each cell of a shell; once, however often the extension is loaded."""
    if magic_first not in shell.input_transformers_cleanup:
        shell.input_transformers_cleanup.insert(0, magic_first)
