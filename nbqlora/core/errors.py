"""One exception tree. Each error is also a standard type, and reads as a few lines in a notebook.

A message says what was given, what was expected and what to do. ``_render_traceback_`` is the hook that
IPython (7.34 to 9) asks before it prints a traceback: the cell still fails for nbval, papermill and
nbmake, but its reader sees only the lines that matter. IPython's own ``UsageError`` would be passed
over in silence by such tools, and a subclass of it prints a full traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


class NbqloraError(Exception):
    """Base of every error that nbqlora raises on purpose."""

    show_traceback = False
    # Written down before they were let go of: frames keep a model alive.
    earlier_frames: tuple[str, ...] = ()

    def _render_traceback_(self) -> list[str]:
        """Lines that IPython prints in place of a traceback."""
        lines = f"{type(self).__name__}: {self}".split("\n")
        if not self.show_traceback:
            return lines
        whole = "".join(traceback.format_exception(self)).rstrip("\n").split("\n")
        return [*whole[: -len(lines)], *"".join(self.earlier_frames).splitlines(), *lines]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a config.

    Args:
        key: the option as the user spelled it, ``trl.lr`` for a key of a table; "" for the cell as a whole.
        message: what was given and what was expected.
        hint: what to do; "" when the message says it.
        line: line of the cell or file, the magic being line 1; None when the option came from Python.
    """

    key: str
    message: str
    hint: str = ""
    line: int | None = None


class ConfigError(NbqloraError, ValueError):
    """Everything wrong with one config, in one error.

    Args:
        problems: at least one, in the order of their lines.
        source: what held them, for the first line of the message ("this cell", "train.toml", "the options").
    """

    def __init__(self, problems: Sequence[Problem], source: str = "the options") -> None:
        self.problems = tuple(problems)
        self.source = source
        super().__init__(self._message())

    def _message(self) -> str:
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in {self.source}"
        columns = (
            _column(["" if p.line is None else f"line {p.line}" for p in self.problems]),
            _column([p.key for p in self.problems]),
            [p.message + (f"; {p.hint}" if p.hint else "") for p in self.problems],
        )
        return "\n".join([head, *(f"  {where}{key}{text}" for where, key, text in zip(*columns, strict=True))])

    def located(self, line_of: Mapping[str, int], source: str) -> ConfigError:
        """The same problems in the order of their lines, where those are known; ``source`` as in the constructor."""
        problems = [replace(p, line=line_of.get(p.key) if p.line is None else p.line) for p in self.problems]
        return ConfigError(sorted(problems, key=lambda p: p.line or 0), source)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...], str]]:
        """Pickled and copied by its problems, not by its text."""
        return type(self), (self.problems, self.source)


def _column(cells: list[str]) -> list[str]:
    """Cells of one width with a gap behind, or nothing where all are empty."""
    width = max(map(len, cells), default=0)
    return [f"{cell:<{width}}  " if width else "" for cell in cells]


class DataError(NbqloraError, ValueError):
    """The training data cannot be read or teaches nothing."""


class ModelError(NbqloraError, OSError):
    """The model or its tokenizer cannot be found, read or trained."""


class DemoModelError(ModelError):
    """The demo model is not cached and could not be fetched, or its bytes are not the known ones."""


class DeviceError(NbqloraError, RuntimeError):
    """The card cannot run this torch, or CUDA does not start on it."""


class DoesNotFitError(NbqloraError, MemoryError):
    """No plan fits the memory; raised before anything is downloaded or loaded."""


class MemoryExhaustedError(DoesNotFitError):
    """Training ran out of memory with nothing left to lower.

    Args:
        tokens: of what did not fit; 0 where that has no tokens.
        room_bytes: what the run could have had in all; None where it is not known.
        adapter_is_whole: it is that of the last step that was done, not one that was cut in two.
    """

    def __init__(
        self, message: str, *, tokens: int = 0, room_bytes: int | None = None, adapter_is_whole: bool = True
    ) -> None:
        self.tokens, self.room_bytes, self.adapter_is_whole = tokens, room_bytes, adapter_is_whole
        super().__init__(message)


class DiskError(NbqloraError, OSError):
    """The disk refused what was written to it; what was there before is whole."""


class OutOfDiskError(DiskError):
    """The disk has too little room for what is about to be written."""


class PublishError(NbqloraError, OSError):
    """What was made cannot be put on the hub; on this machine nothing was changed."""


class TrainingError(NbqloraError, RuntimeError):
    """Training failed; the message says where and what was kept."""


class LostRankError(TrainingError):
    """Another of the processes that train together is gone."""


class NonFiniteLossError(TrainingError, ArithmeticError):
    """The loss became NaN or infinite; the message names the rows of the batch."""


class InterruptedRunError(NbqloraError, KeyboardInterrupt):
    """The run was interrupted where it could not end normally: while loading, or twice while training."""


class RunError(NbqloraError, RuntimeError):
    """A ``Run`` was asked for something that it cannot do in its state."""


def clear_frames(error: BaseException) -> None:
    """Drop the locals of the frames that an error, and what led to it, left behind: they keep the model alive."""
    chain, seen = [error], set[int]()
    while chain:
        one = chain.pop()
        if id(one) not in seen:
            seen.add(id(one))
            if isinstance(one, NbqloraError):
                one.earlier_frames = one.earlier_frames or tuple(traceback.format_tb(one.__traceback__))
            traceback.clear_frames(one.__traceback__)
            chain += [e for e in (one.__cause__, one.__context__) if e is not None]
