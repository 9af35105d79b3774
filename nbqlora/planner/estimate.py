"""Bytes and seconds of one way to run: the arithmetic of a plan.

Bytes are counted tensor by tensor for the path that runs, fused layers or transformers' own, not fitted to a
measurement.
"""

from __future__ import annotations

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.plan import MemoryBudget
from nbqlora.core.specs import DeviceSpec, ModelSpec
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.fused import fused_family
from nbqlora.planner.fused_memory import FusedMemory, fused_memory
from nbqlora.planner.fused_pace import fused_pace
from nbqlora.planner.mix import Mix
from nbqlora.planner.pace import Load, Pace, stock_pace
from nbqlora.planner.shards import shards_of
from nbqlora.planner.standing import DTYPE_BYTES, quantized
from nbqlora.planner.stock import StockMemory

Memory = FusedMemory | StockMemory


def memory_of(config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, dtype: str, batch: MicroBatch) -> Memory:
    """What a micro-batch takes, for any mix of layers."""
    family = fused_family(model, config)
    if family is None:
        return StockMemory(config=config, model=model, device=device, batch=batch, c=DTYPE_BYTES[dtype])
    return fused_memory(config, family, model, device, dtype, batch)


def budget(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, dtype: str, batch: MicroBatch, mix: Mix
) -> MemoryBudget:
    """Predicted bytes at the peak."""
    return memory_of(config, model, device, dtype, batch).budget(mix)


def pace_of(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, dtype: str, load: Load, *, dense: bool
) -> Pace:
    """How long a step takes.

    Args:
        dense: each row is one document.
    """
    family = fused_family(model, config)
    if family is None:
        return stock_pace(model, device, dtype, load)
    shards = shards_of(config)
    return fused_pace(
        family, model, device, dtype, load, quantized=quantized(model, config), dense=dense, shards=shards
    )
