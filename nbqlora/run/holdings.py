"""What a run's tensors hold, by the words of the plan: counted on the model, its buffers and its optimizer."""

from __future__ import annotations

from typing import Any

import torch

from nbqlora.core.specs import DeviceSpec, MemoryCategory
from nbqlora.engine.fused import engine_of
from nbqlora.engine.loaded import LoadedModel
from nbqlora.engine.sharded import shards_of
from nbqlora.memory.profile import Profile
from nbqlora.memory.tensors import storage_bytes, with_quantization


def profile_on(device: DeviceSpec) -> Profile:
    """A profile of a run on this machine; on a CPU the process as it is counts too."""
    return Profile(device.kind, base_bytes=device.context_bytes if device.kind == "cpu" else 0)


def hold(profile: Profile, loaded: LoadedModel, optimizer: Any = None) -> None:
    """Tell the profile what the run's tensors hold now."""
    profile.hold(loaded.model, holdings(loaded, optimizer))


def holdings(loaded: LoadedModel, optimizer: Any = None) -> dict[MemoryCategory, int]:
    """Bytes on the model's device by holder; a few milliseconds for hundreds of layers.

    Args:
        optimizer: with its states; None where there is none.
    """
    kind, seen, m = loaded.device.type, set[int](), MemoryCategory
    engine = engine_of(loaded.model)
    flat = engine.scratch.adapters if engine is not None else None
    trained = list(loaded.trainable())
    copies = [flat.copy_of(p) for p in flat.parameters] if flat is not None else []
    # First come, first counted: what trains before the rest, which holds it too.
    adapter = storage_bytes([*trained, *copies], kind, seen)
    gradient = flat.gradient if flat is not None else None
    shards = shards_of(loaded.model)
    weights = [*loaded.model.buffers(), *(x.share for x in (shards.layers if shards is not None else ()))]
    return {
        m.ADAPTER: adapter,
        m.GRADIENTS: storage_bytes([gradient, *(p.grad for p in trained)], kind, seen),
        m.OPTIMIZER: storage_bytes(_states(optimizer), kind, seen),
        m.WEIGHTS: storage_bytes([*with_quantization(loaded.model.parameters()), *weights], kind, seen),
        m.DEQUANT: engine.scratch.arena.held_bytes if engine is not None else 0,
    }


def _states(optimizer: Any) -> list[torch.Tensor]:
    inner = getattr(optimizer, "optimizer", optimizer)  # within accelerate's wrapper
    states = inner.state.values() if inner is not None else ()
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
