"""How many processes a run takes on this machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.ranks import rank_of


def workers_asked(config: FinetuneConfig, environ: Mapping[str, str]) -> int:
    """The processes to start; 1 where the run stays in this one, as in a worker.

    CUDA is not started: torch asks the driver's management library how many cards there are.

    Raises:
        ConfigError: there are fewer cards.
        RunError: the environment says that this is one of several processes, and says it wrongly.
    """
    if config.gpus is None or not rank_of(environ).alone:
        return 1
    if sys.platform == "win32" and config.gpus != 1:
        message = "workers are started on Linux and macOS only"
        raise ConfigError([Problem(key="gpus", message=message, hint="leave it out: one card trains")])
    cards = torch.cuda.device_count()
    if isinstance(config.gpus, str):
        return max(1, cards)
    if 0 < cards < config.gpus:
        message = f"{config.gpus} are asked for, and this machine has {cards}"
        raise ConfigError([Problem(key="gpus", message=message, hint='write "all", or leave it out for one')])
    return config.gpus
