"""What takes a card seconds before its first step, begun before anything of the run is known but its options.

Triton keeps what it compiles in a folder of the machine, so processes that train together compile a share each, wait
for each other, and find the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.ranks import Rank
from nbqlora.engine.rehearsal import Rehearsal, shape_of
from nbqlora.hub.load import DTYPES
from nbqlora.hub.nearby import nearby_config
from nbqlora.memory.device import has_bf16
from nbqlora.planner.standing import auto_dtype


def rehearsal_for(config: FinetuneConfig, device: torch.device) -> Rehearsal | None:
    """A layer like those of the run; None where its model is not here yet, or has no fused layers."""
    found = nearby_config(config.model)
    shape = None if found is None else shape_of(found)
    if shape is None:
        return None
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


def rehearse(config: FinetuneConfig, rank: Rank, meet: Callable[[], None]) -> str:
    """Compile and load the kernels of a run on this process's card; "" or why they will be when they are used first.

    Whatever fails here fails there again, where it is an error.

    Args:
        meet: waits for all ranks; called once where there are cards, whatever happens on this one.
    """
    if not torch.cuda.is_available():
        return ""
    said = "" if rank.n_local == 1 else _tried(config, rank)
    meet()
    return said or _tried(config)


def _tried(config: FinetuneConfig, shared: Rank | None = None) -> str:
    try:
        rehearsal = rehearsal_for(config, torch.device("cuda", torch.cuda.current_device()))
        if rehearsal is not None and shared is not None:
            rehearsal.run_share(shared.local, shared.n_local)
        elif rehearsal is not None:
            rehearsal.run()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return f"kernels are compiled when they are used first, not ahead: {type(error).__name__}: {first}"
    return ""
