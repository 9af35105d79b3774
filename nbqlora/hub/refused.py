"""What the disk refuses, said once: a full disk is an error of its own, whichever library met it.

Python says ``OSError`` with a number. The libraries in Rust (safetensors, tokenizers) say it in words, as exceptions
of their own kinds or of none, with the number in the text.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from nbqlora.core.errors import DiskError, NbqloraError, OutOfDiskError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
SAID = re.compile(r"\(os error (\d+)\)")


@contextmanager
def disk_errors(what: str, advice: str) -> Iterator[None]:
    """Within, what the disk refuses becomes one line.

    Args:
        what: what could not be done, ``the adapter cannot be written``.
        advice: where a good state is, or what to do.

    Raises:
        OutOfDiskError: there is no room.
        DiskError: another refusal.
    """
    try:
        yield
    except NbqloraError:
        raise
    except Exception as error:
        found = _as_os_error(error)
        if found is None:
            raise
        kind = OutOfDiskError if found.errno in NO_ROOM else DiskError
        raise kind(f"{what}: {found.strerror or str(found).splitlines()[0]}; {advice}") from error


def _as_os_error(error: Exception) -> OSError | None:
    """The refusal that an exception tells of, None when it tells of something else."""
    if isinstance(error, OSError):
        return error
    said = SAID.search(str(error))
    return OSError(int(said[1]), os.strerror(int(said[1]))) if said else None
