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
# transformers wonders about a group of processes that it is not told of (nbqlora.train.together). The hub's client
# tells each try at a hub that is busy; hub.access tells once that it tries.
KNOWN_LOGS = (
    "Failed to load CPU gemm_4bit_forward",
    "Padding-free training is enabled, but the attention",
    "You are using a per_device_train_batch_size of 1 with padding-free training",
    "torch.distributed process group is initialized, but parallel_mode",
    "HTTP Error 503 thrown while requesting",
    "HTTP Error 429 thrown while requesting",
    "Retrying in ",
)


@contextmanager
def quiet_libraries(*, progress_bars: bool = False) -> Iterator[None]:
    """Within, known noise is dropped; ``progress_bars`` leaves transformers' bars (downloads) on."""
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    if not progress_bars:
        hf_logging.disable_progress_bar()
    dropped = _Known()
    logs = [logging.getLogger(name) for name in ("bitsandbytes", "transformers", "huggingface_hub", None)]
    handlers = [*(h for log in logs for h in log.handlers), *([logging.lastResort] if logging.lastResort else [])]
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
