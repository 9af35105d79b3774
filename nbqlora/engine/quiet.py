"""Keeps known noise of the libraries out of a notebook; everything unknown still shows.

Each entry is a warning that the user can do nothing about, seen with the versions of ``constraints.txt``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Messages by their beginning: transformers 5.23 renamed checkpointing arguments that TRL still reads.
KNOWN_WARNINGS = (
    r"`is_gradient_checkpointing` is deprecated",
    r"`gradient_checkpointing` is deprecated",
    r"`gradient_checkpointing_kwargs` is deprecated",
)
# bitsandbytes looks for a prebuilt CPU kernel on the hub and says so when it finds none. TRL doubts packing
# without flash attention; with SDPA the mask is made from the position ids, and the loss is the same (tests).
KNOWN_LOGS = (
    "Failed to load CPU gemm_4bit_forward",
    "Padding-free training is enabled, but the attention",
    "You are using a per_device_train_batch_size of 1 with padding-free training",
)


@contextmanager
def quiet_libraries(*, progress_bars: bool = False) -> Iterator[None]:
    """Within, known noise is dropped; ``progress_bars`` leaves transformers' bars (downloads) on."""
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    if not progress_bars:
        hf_logging.disable_progress_bar()
    log, dropped = logging.getLogger("bitsandbytes"), _Known()
    handlers = [*log.handlers, *logging.getLogger().handlers, *([logging.lastResort] if logging.lastResort else [])]
    for handler in handlers:
        handler.addFilter(dropped)
    try:
        with warnings.catch_warnings():
            for message in KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=message, category=FutureWarning)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(dropped)
        if bars:
            hf_logging.enable_progress_bar()


class _Known(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(known in record.getMessage() for known in KNOWN_LOGS)
