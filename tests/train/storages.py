"""How many bytes of tensors live at once, by device, while something runs: ``meta`` stands for a card."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Storages(TorchDispatchMode):
    """Within, the storages of everything that an operation gives are counted; ``peak`` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak: Counter[str] = Counter()
        self._seen: dict[int, tuple[StorageWeakRef, str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # a view, or the argument itself, is nothing new
                    self._seen[storage._cdata] = (StorageWeakRef(storage), tensor.device.type, storage.nbytes())
        live: Counter[str] = Counter()
        for key, (ref, device, n_bytes) in list(self._seen.items()):
            if ref.expired():
                del self._seen[key]
            else:
                live[device] += n_bytes
        self.peak |= live
        return out
