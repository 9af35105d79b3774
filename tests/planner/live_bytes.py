"""What the engine's layers hold: tensors that exist while a function runs, each storage once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from nbqlora.engine.attention import AttentionKind, Documents
from nbqlora.engine.fused import engine_of
from nbqlora.engine.layer import Call, Layer
from nbqlora.engine.optimize import optimize


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class LivePeak(TorchDispatchMode):
    """Most bytes that exist at once of what is made inside, looked at after each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._look()
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._before[storage._cdata] = storage
        found = func(*args, **(kwargs or {}))
        for storage in _storages(found):
            if storage._cdata not in self._before:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._look()
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return found

    def _look(self) -> None:
        """Forget what is gone."""
        self._made = {key: (ref, size) for key, (ref, size) in self._made.items() if not ref.expired()}


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor)]


@dataclass
class Stand:
    """One fused layer of a model, with what a forward is given."""

    layer: Layer
    call: Call
    x: torch.Tensor


def stand(model: Any, documents: Documents, *, index: int = 1) -> Stand:
    """The layer ``index`` of a model that is fused here."""
    optimize(model)
    engine = engine_of(model)
    assert engine is not None and engine.complete
    if engine.scratch.arena.n_bytes:
        engine.scratch.arena.take(1, 1, torch.uint8)  # it stays
    engine.scratch.needed_adapters().all_gradients()
    layer = list(engine.layers.values())[index]
    width = layer.o.n_out
    x = torch.randn(documents.tokens, width, generator=torch.Generator().manual_seed(0)).to(engine.dtype)
    angles = torch.randn(documents.tokens, layer.heads.dim, generator=torch.Generator().manual_seed(1)).to(engine.dtype)
    kind = AttentionKind.MATH if layer.heads.softcap else AttentionKind.SDPA
    return Stand(layer, Call(documents=documents, cos=angles.cos(), sin=angles.sin(), attention=kind), x)


def live_peak(work: Callable[[], Any]) -> int:
    """Most bytes that exist at once while ``work`` runs, beyond what was there before."""
    with LivePeak() as found:
        work()
    return found.peak


def allocated_peak(work: Callable[[], Any], trace: Path) -> int:
    """Highest bytes that the CPU allocator handed out at once beyond what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        highest = max(highest, now)
    return highest
