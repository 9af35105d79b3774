"""llama.cpp's quantizer in a process of its own: GGUF in, GGUF out.

    python quantizer.py SOURCE TARGET FTYPE THREADS

It runs as a script and imports nothing of nbqlora. A process of its own, because the quantizer is C++ that ends the
whole process when an assertion fails, and cannot be interrupted; a notebook must survive both.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress


def main() -> None:
    """Quantize; exits with 1 and a line on stderr when the quantizer refused."""
    source, target, ftype, threads = sys.argv[1:]
    _end_with_parent()
    from cyllama.llama import llama_cpp

    settings = llama_cpp.LlamaModelQuantizeParams()
    settings.ftype = int(ftype)
    settings.nthread = int(threads)
    llama_cpp.llama_backend_init()
    try:
        llama_cpp.model_quantize(source, target, settings)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(str(error))


def _end_with_parent() -> None:
    """On Linux, be killed when the parent dies: it would quantize on for minutes, for nobody."""
    pr_set_pdeathsig = 1
    with suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    main()
