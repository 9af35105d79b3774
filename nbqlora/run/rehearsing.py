"""What takes a card seconds before its first step, begun before anything of the run is known but its options.

Triton keeps what it compiles in a folder of the machine, so processes that train together compile a share each, wait
for each other, and find the rest. Attention's kernels are CUDA's: each process loads them meanwhile in a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.ranks import Rank
from nbqlora.engine.layer_shape import LayerShape, shape_of
from nbqlora.engine.rehearsal import Rehearsal
from nbqlora.hub.load import DTYPES
from nbqlora.hub.nearby import nearby_config
from nbqlora.memory.device import has_bf16
from nbqlora.planner.standing import auto_dtype
from nbqlora.run.beside import Beside


def shape_for(config: FinetuneConfig) -> LayerShape | None:
    """The widths of a run's layers; None where its model is not here yet, or has no fused layers.

    It may import what looks into the hub's cache, so it is not for a thread beside other imports.
    """
    found = nearby_config(config.model)
    return None if found is None else shape_of(found)


def rehearsal_for(config: FinetuneConfig, shape: LayerShape, device: torch.device) -> Rehearsal:
    """A layer like those of the run."""
    asked, targets = config.dtype, config.target_modules
    if asked == "auto":
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        asked = auto_dtype(device.type, has_bf16(capability))
    return Rehearsal(
        shape=shape,
        device=device,
        dtype=DTYPES[asked],
        in_4bit=config.load_in_4bit,
        lora_r=config.lora_r,
        adapted=None if targets == "all-linear" else (targets,) if isinstance(targets, str) else targets,
    )


def rehearse(config: FinetuneConfig, shape: LayerShape | None, rank: Rank, meet: Callable[[], None]) -> str:
    """Compile and load the kernels of a run on this process's card; "" or why they will be when they are used first.

    Whatever fails here fails there again, where it is an error.

    Args:
        shape: as :func:`shape_for` found it.
        meet: waits for all ranks; called once where there are cards, whatever happens on this one.
    """
    if not torch.cuda.is_available():
        return ""
    if shape is None or rank.n_local == 1:
        meet()
        return "" if shape is None else _tried(config, shape, Rehearsal.run)
    attention = Beside(partial(_tried, config, shape, Rehearsal.attend))
    _tried(config, shape, lambda rehearsal: rehearsal.run_share(rank.local, rank.n_local))
    meet()
    attention.result()
    return _tried(config, shape, Rehearsal.run)  # where a part of it failed alone, this fails too, or has done it


def _tried(config: FinetuneConfig, shape: LayerShape, part: Callable[[Rehearsal], None]) -> str:
    try:
        part(rehearsal_for(config, shape, torch.device("cuda", torch.cuda.current_device())))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return f"kernels are compiled when they are used first, not ahead: {type(error).__name__}: {first}"
    return ""
