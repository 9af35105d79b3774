"""What tests of split weights share: machines, models, and a plan for two cards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nbqlora.core.errors import DoesNotFitError
from nbqlora.core.plan import Plan
from nbqlora.core.specs import DeviceSpec, ModelSpec
from nbqlora.planner import make_plan
from nbqlora.planner.cards import Cards
from tests.planner.shapes import GIB, MODELS, card, llama, options, rows_of

# Kaggle's pair, with 29 GiB of RAM; two consumer cards; two of a data centre.
T4S = replace(card("Tesla T4", 14.56, bf16=False, flops=2.6e13), n_devices=2, host_free_bytes=29 * GIB)
PAIR_24 = replace(card("RTX 4090", 23.6, bf16=True, flops=1.3e14, capability=(8, 9)), n_devices=2)
PAIR_80 = replace(
    card("NVIDIA H100 80GB HBM3", 79.2, bf16=True, flops=7.9e14, capability=(9, 0)), n_devices=2,
    host_free_bytes=200 * GIB,
)  # fmt: skip


def qwen(name: str, layers: int, d: int, f: int) -> ModelSpec:
    """Qwen 2.5's 14B and 32B."""
    spec, vocab = llama(name, layers, d, f, 40, 8), 152064
    shapes = spec.linear_shapes
    assert (spec.head_dim, shapes["k_proj"]) == (128, (1024, 5120))
    n_params = spec.n_params + 2 * (vocab - spec.vocab_size) * d
    return replace(spec, architecture="qwen2", vocab_size=vocab, n_params=n_params)


MODEL = {**MODELS, "14B": qwen("14B", 48, 5120, 13824), "32B": qwen("32B", 64, 5120, 27648)}


def plan(model: str, device: DeviceSpec, *, tokens: int = 1024, cards: Cards | None = None, **changes: Any) -> Plan:
    config = options(**{"max_length": tokens, "gpus": 2, **changes})
    return make_plan(config, MODEL[model], device, rows_of(tokens), output_dir="runs/run", cards=cards)


def refused(*args: Any, **changes: Any) -> list[str]:
    """The error's lines."""
    try:
        plan(*args, **changes)
    except DoesNotFitError as error:
        return [line.strip() for line in str(error).splitlines()]
    raise AssertionError("it fits")


def row(found: Plan, name: str) -> tuple[str, str]:
    (decision,) = [d for d in found.decisions if d.name == name]
    return decision.value, decision.because
