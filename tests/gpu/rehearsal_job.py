"""From a cold cache of kernels to a model that is ready to train, rehearsed or not; what was compiled, and the seconds.

``python -m tests.gpu.rehearsal_job MODEL FOLDER plain|rehearsed|shared``; one JSON line. ``shared``: first what each of
two processes would compile for both, one after the other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(model: str, folder: str, how: str) -> None:
    cache = Path(folder) / "kernels"
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    import torch
    import torch.fx.experimental.symbolic_shapes

    import nbqlora.run.ranks  # noqa: F401
    from nbqlora.core.config import FinetuneConfig
    from nbqlora.core.ranks import ALONE
    from nbqlora.run.rehearsing import rehearsal_for, rehearse, shape_for

    options: dict[str, Any] = {"model": model, "max_length": 1024, "per_device_train_batch_size": 2, "lora_r": 8}
    torch.zeros(1, device="cuda")
    told: dict[str, Any] = {"held": -torch.cuda.memory_allocated()}
    config = FinetuneConfig(data=[], **options)
    shape = shape_for(config)
    assert shape is not None
    if how == "shared":
        rehearsal, told["shares"] = rehearsal_for(config, shape, torch.device("cuda", 0)), []
        for number in range(2):
            rehearsal.run_share(number, 2)
            told["shares"].append(compiled(cache))
    if how != "plain":
        before, begun = set(sys.modules), time.perf_counter()
        told["said"] = rehearse(config, shape, ALONE, lambda: None)
        told["rehearsed_seconds"] = time.perf_counter() - begun
        told["imported"] = sorted(set(sys.modules) - before)
    told["held"] += torch.cuda.memory_allocated()
    told["reserved"] = torch.cuda.memory_reserved()
    told["kernels"] = compiled(cache)
    told["loaded_seconds"] = load(model, options)
    told["more"] = [name for name in compiled(cache) if name not in told["kernels"]]
    print(json.dumps(told))


def load(model: str, options: dict[str, Any]) -> float:
    """Seconds to plan, load, prepare and probe the layout; the imports of libraries are not among them."""
    import nbqlora.train.trainer  # noqa: F401
    from nbqlora.run.layout import probe_loaded
    from nbqlora.run.loading import load_to_train

    begun = time.perf_counter()
    assert probe_loaded(load_to_train(model, options), [list(range(3, 64))]).exact
    return time.perf_counter() - begun


def compiled(cache: Path) -> list[str]:
    """Kernels in the cache."""
    return sorted(str(file.relative_to(cache)) for file in cache.glob("*/*.cubin"))


if __name__ == "__main__":
    main(*sys.argv[1:])
