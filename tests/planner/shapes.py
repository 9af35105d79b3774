"""Models and machines to plan for, built by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.plan import Plan
from nbqlora.core.specs import DataStats, DeviceSpec, HeadSpec, ModelSpec
from nbqlora.planner import make_plan
from nbqlora.planner.mix import Mix

GIB = 1 << 30


def llama(name: str, layers: int, d: int, f: int, heads: int, kv: int, *, tied: bool = False) -> ModelSpec:
    head_dim, vocab = d // heads, 128256
    small = kv * head_dim
    shapes = {
        "q_proj": (d, d), "k_proj": (small, d), "v_proj": (small, d), "o_proj": (d, d),
        "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f),
    }  # fmt: skip
    n_linear = layers * sum(n * k for n, k in shapes.values())
    return ModelSpec(
        name=name,
        architecture="llama",
        n_layers=layers,
        d_model=d,
        d_ff=f,
        n_heads=heads,
        n_kv_heads=kv,
        head_dim=head_dim,
        vocab_size=vocab,
        n_params=n_linear + vocab * d * (1 if tied else 2) + (2 * layers + 1) * d,
        n_linear_params=n_linear,
        linear_shapes=shapes,
        head=HeadSpec(tied=tied),
    )


MODELS = {
    "1B": llama("1B", 16, 2048, 8192, 32, 8, tied=True),
    "3B": llama("3B", 28, 3072, 8192, 24, 8, tied=True),
    "8B": llama("8B", 32, 4096, 14336, 32, 8),
    "13B": llama("13B", 40, 5120, 13824, 40, 40),
    "70B": llama("70B", 80, 8192, 28672, 64, 8),
    "405B": llama("405B", 126, 16384, 53248, 128, 8),
    # Of a family without fused layers.
    "stock 8B": replace(llama("stock 8B", 32, 4096, 14336, 32, 8), architecture="cohere"),
}


def card(
    name: str,
    total_gib: float,
    *,
    bf16: bool,
    flops: float | None,
    context_gib: float = 0.4,
    capability: tuple[int, int] | None = None,
) -> DeviceSpec:
    context = int(context_gib * GIB)
    return DeviceSpec(
        kind="cuda",
        name=name,
        total_bytes=int(total_gib * GIB),
        free_bytes=int(total_gib * GIB) - context,
        context_bytes=context,
        host_free_bytes=12 * GIB,
        disk_free_bytes=100 * GIB,
        capability=capability or ((8, 0) if bf16 else (7, 5)),
        has_bf16=bf16,
        has_triton=True,
        matmul_flops=flops,
    )


def cpu(total_gib: float = 2, *, held_gib: float = 0.5, flops: float | None = 6e10) -> DeviceSpec:
    free = int((total_gib - held_gib) * GIB)
    return DeviceSpec(
        kind="cpu",
        name="2 CPU cores",
        total_bytes=int(total_gib * GIB),
        free_bytes=free,
        context_bytes=int(held_gib * GIB),
        host_free_bytes=free,
        disk_free_bytes=100 * GIB,
        matmul_flops=flops,
    )


DEVICES = {
    "T4": card("Tesla T4", 14.74, bf16=False, flops=2.5e13),
    "H100": card("H100", 80, bf16=True, flops=7.9e14, capability=(9, 0)),
    "laptop": card("RTX 4060 Laptop", 8, bf16=True, flops=3e13, capability=(8, 9)),
    "CPU": cpu(),
}


def rows_of(tokens: int = 1024, *, n: int = 1000, packs: int | None = None) -> DataStats:
    """Rows up to ``tokens`` long, three quarters of that in the mean, a third of it supervised."""
    mean = tokens * 3 // 4
    return DataStats(
        n_rows=n,
        n_sequences=packs or n,
        n_tokens=n * mean,
        n_supervised_tokens=n * mean // 3,
        max_tokens=tokens,
        percentiles=(tokens // 2, tokens * 5 // 8, mean, tokens * 7 // 8, tokens),
    )


def options(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"model": "m", "data": "rows", **changes})


def plan(
    model: str = "8B", device: str | DeviceSpec = "T4", *, tokens: int = 1024, n: int = 1000, **changes: Any
) -> Plan:
    where = DEVICES[device] if isinstance(device, str) else device
    config = options(**{"max_length": tokens, **changes})
    return make_plan(config, MODELS[model], where, rows_of(tokens, n=n), output_dir="runs/run")


def mix_of(n_layers: int, keep: int = 0, mlp: int = 0, **more: int) -> Mix:
    """Layers that keep all, all but their MLP's, or do something else; the rest recomputes."""
    others = sum(n for name, n in more.items() if name != "tile_tokens")
    return Mix(keep=keep, recompute_mlp=mlp, recompute=n_layers - keep - mlp - others, **more)
