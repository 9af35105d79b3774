"""The input embedding in host memory: the last gibibyte of a card, for models whose head is another matrix.

A micro-batch reads a row of it for each token, so its copy is as large as a layer's input. The engine has to know the
ids on the host for that, which a captured step cannot wait for: so it is tried for rows that are not captured anyway,
where nothing else fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.plan import Decision, Plan
from nbqlora.core.specs import DeviceSpec, ModelSpec
from nbqlora.core.units import format_bytes
from nbqlora.planner.batch import CAPTURED_TOKENS
from nbqlora.planner.fused import fused_family
from nbqlora.planner.limits import Limits, limits_of
from nbqlora.planner.standing import DTYPE_BYTES

# Settings of PEFT that may train the embedding.
MAY_TRAIN_IT = ("modules_to_save", "trainable_token_indices")


def embedding_bytes(model: ModelSpec, c: int) -> int:
    """Of the matrix, in a dtype of ``c`` bytes."""
    return model.vocab_size * model.d_model * c


def ways(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, dtype: str, row_tokens: int
) -> Iterator[tuple[ModelSpec, Limits]]:
    """The model as it is, then with its embedding on the host if that can be, and what is left for inputs there."""
    limits = limits_for(config, model, device, dtype)
    yield model, limits
    size = embedding_bytes(model, DTYPE_BYTES[dtype])
    if may_be_on_host(config, model, device, row_tokens) and limits.host_bytes >= size:
        there = replace(model, embedding_on_host=True)
        yield there, limits_for(config, there, device, dtype)


def may_be_on_host(config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, row_tokens: int) -> bool:
    """Whether it is a matrix by itself, frozen, the device is not the host, and rows are that long."""
    if (
        row_tokens <= CAPTURED_TOKENS
        or device.kind == "cpu"
        or model.tied
        or any(config.peft.get(name) for name in MAY_TRAIN_IT)
    ):
        return False
    return fused_family(model, config) is not None


def limits_for(config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, dtype: str) -> Limits:
    """What a config allows on a machine, less the host memory of an embedding that is there."""
    limits = limits_of(config, device)
    taken = embedding_bytes(model, DTYPE_BYTES[dtype]) if model.embedding_on_host else 0
    return replace(limits, host_bytes=max(0, limits.host_bytes - taken))


def inputs_bytes(config: FinetuneConfig, plan: Plan) -> int:
    """What layers' inputs may take of the host beside a plan's embedding."""
    model = replace(plan.model, embedding_on_host=plan.offload_embedding)
    return limits_for(config, model, plan.device, plan.dtype).host_bytes


def decision(model: ModelSpec, dtype: str) -> Decision:
    """What it brings, and takes."""
    size = format_bytes(embedding_bytes(model, DTYPE_BYTES[dtype]))
    because = f"nothing fits with its {size} on the card; each micro-batch copies a row a token"
    return Decision(name="embedding", value=f"{size} in host memory", because=because)
