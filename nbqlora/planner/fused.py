"""What a fused layer keeps between its forward and its backward, tensor by tensor and to the byte.

The counterpart of ``engine.layer_forward``, which keeps a dict of tensors: here are the same names with their bytes.
Of a Llama layer those are its input (d), q, k and v, attention's result and its log-sum-exp, the residual between the
halves (d), gate and up (2f), and each adapter's small product. Norms and the activation are computed again, frozen
matmuls need nothing, and dropout keeps a seed. A norm behind a half needs what it norms, and that lies in the buffer
that the projection wrote, with its r further columns. A test compares every family with the real dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.families import FAMILIES, Family
from nbqlora.core.specs import DeviceSpec, LayerPolicy, ModelSpec
from nbqlora.planner.attention import CAPTURED, Attended, choose_kernel
from nbqlora.planner.batch import CAPTURED_TOKENS, MicroBatch
from nbqlora.planner.shards import NOT_CAPTURED, shards_of
from nbqlora.planner.standing import DTYPE_BYTES, quantized, targets

# A group's projections, in the engine's order; a family has those of the one or of the other name.
GROUPS = {
    "qkv": ("qkv_proj", "q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_up_proj", "gate_proj", "up_proj"),
    "down": ("down_proj",),
}
# What each policy drops, by the beginnings of names, as the engine drops it. The input is no part of it: a layer that
# offloads or joins gives it away afterwards.
_ALL = ("gate_up", "u_gate_up", "down", "qkv", "u_qkv", "attention", "o", "u_o", "between")
DROPPED: Mapping[LayerPolicy, tuple[str, ...]] = {
    LayerPolicy.KEEP: (),
    LayerPolicy.RECOMPUTE_MLP: ("gate_up", "u_gate_up", "down"),
    LayerPolicy.RECOMPUTE: _ALL,
    LayerPolicy.OFFLOAD: _ALL,
    LayerPolicy.JOIN: _ALL,
}
# Settings of LoRA that no fused layer has.
_NOT_FUSED = ("use_dora", "lora_bias")


def fused_family(model: ModelSpec, config: FinetuneConfig) -> Family | None:
    """The family's row, where this model's layers will be fused ones; None where they stay transformers' own."""
    if any(config.peft.get(name) for name in _NOT_FUSED) or config.peft.get("bias", "none") != "none":
        return None
    return FAMILIES.get(model.architecture)


def not_captured_because(
    family: Family | None,
    model: ModelSpec,
    device: DeviceSpec,
    dtype: str,
    *,
    row_tokens: int = 0,
    shards: int = 1,
) -> str:
    """Why steps are not captured as CUDA graphs, in the engine's words; "" where they are.

    Args:
        family: None where layers stay transformers' own.
        row_tokens: of the longest row, what lies end to end being one; 0 for one that is short enough.
        shards: cards over which a layer's weights are split.
    """
    if device.kind == "cpu":
        return "a CPU has no graphs to capture"
    if family is None:
        return "not every layer is a fused one"
    if shards > 1:
        return NOT_CAPTURED
    if model.embedding_on_host:
        return "the embedding is looked up in host memory"
    if choose_kernel(family, device, dtype, model.head_dim, dense=False)[0] not in CAPTURED:
        return "its attention is computed document by document"
    if row_tokens > CAPTURED_TOKENS:
        return f"rows of more than {CAPTURED_TOKENS:,} tokens keep the card busy, and graphs would hold memory"
    return ""


def captures(
    family: Family | None, model: ModelSpec, config: FinetuneConfig, device: DeviceSpec, dtype: str, batch: MicroBatch
) -> bool:
    """Whether steps of such a micro-batch are captured."""
    rows, shards = batch.line_tokens, shards_of(config)
    return not not_captured_because(family, model, device, dtype, row_tokens=rows, shards=shards)


@dataclass(frozen=True, kw_only=True)
class FusedLayer:
    """A fused layer for one micro-batch.

    Args:
        shapes: ``(out_features, in_features)`` of each linear.
        ranks: of each linear's adapter; 0 or absent for none.
        c: bytes of the dtype.
        quantized: its linears are NF4, and unpacked into the arena.
        dropout: adapters drop a share of their input.
        reference: elementwise work is done in plain torch, with its temporaries.
    """

    family: Family
    shapes: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, int]
    c: int
    tokens: int
    attended: Attended
    quantized: bool = True
    dropout: bool = False
    reference: bool = False
    r: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        ranks = {group: sum(self.ranks.get(n, 0) for n in names) for group, names in GROUPS.items()}
        object.__setattr__(self, "r", ranks)

    @property
    def d(self) -> int:
        """Width of the model."""
        return self.shapes["o_proj"][0]

    @property
    def f(self) -> int:
        """Width of the MLP."""
        return self.shapes["down_proj"][1]

    @property
    def q(self) -> int:
        """Columns of q."""
        return self.attended.q

    @property
    def qkv(self) -> int:
        """Columns of q, k and v."""
        return self.attended.q + 2 * self.attended.kv

    @property
    def joined_gate_up(self) -> bool:
        """Gate and up are one projection, whose gradient has room for the small one."""
        return "gate_up_proj" in self.shapes

    def group(self, name: str) -> list[tuple[int, int, int]]:
        """``(n_out, n_in, r)`` of each projection of a group."""
        return [(*self.shapes[n], self.ranks.get(n, 0)) for n in GROUPS[name] if n in self.shapes]

    def rows(self, width: int) -> int:
        """Bytes of ``[tokens, width]`` in the dtype."""
        return self.tokens * width * self.c

    @cached_property
    def tensors(self) -> dict[str, int]:
        """Everything that a forward may keep: bytes for all tokens, by the engine's names."""
        d, r = self.d, self.r
        widths = {
            "x": d, "u_qkv": r["qkv"], "qkv": self.qkv, "attention": self.q, "u_o": r["o"], "between": d,
            "u_gate_up": r["gate_up"], "gate_up": 2 * self.f, "u_down": r["down"],
        }  # fmt: skip
        if self.family.attention_out:
            widths["o"] = d + r["o"]
        if self.family.mlp_out:
            widths["down"] = d + r["down"]
        return {**{name: self.rows(n) for name, n in widths.items()}, "attention_0": self.attended.saved_bytes}

    def kept(self, policy: LayerPolicy) -> dict[str, int]:
        """What a forward keeps of them by its policy, the input among it."""
        dropped = DROPPED[policy]
        return {n: size for n, size in self.tensors.items() if not dropped or not n.startswith(dropped)}

    def kept_bytes(self, policy: LayerPolicy) -> int:
        """Bytes of that."""
        return sum(self.kept(policy).values())

    def stored_bytes(self, policy: LayerPolicy) -> int:
        """Bytes on the card between forward and backward: without an input that is offloaded or not stored."""
        away = self.tensors["x"] if policy in (LayerPolicy.OFFLOAD, LayerPolicy.JOIN) else 0
        return self.kept_bytes(policy) - away

    @property
    def arena_bytes(self) -> int:
        """The largest unpacked weight with B's columns, or A's rows, as ``Group.scratch_elements``."""
        if not self.quantized:
            return 0
        return self.c * max(self._largest(name) for name in GROUPS)

    def _largest(self, name: str) -> int:
        projections, r = self.group(name), self.r[name]
        parts = [[p] for p in projections] if name == "gate_up" else [projections]
        sizes = [(sum(n for n, _, _ in part), part[0][1], sum(rank for _, _, rank in part)) for part in parts]
        return max(max(n * (k + r), (n + own) * k) for n, k, own in sizes)

    def unpacked_bytes(self, name: str) -> int:
        """A copy of a group's largest weight, bitsandbytes' own, with its scales in fp32: it unpacks on a CPU."""
        if not self.quantized or self.attended.on_card:
            return 0
        return max(int(n * k * (self.c + 4 / 64)) for n, k, _ in self.group(name))


def fused_layer(
    family: Family,
    model: ModelSpec,
    config: FinetuneConfig,
    device: DeviceSpec,
    dtype: str,
    batch: MicroBatch,
) -> FusedLayer:
    """One layer of a model, for a micro-batch."""
    captured = captures(family, model, config, device, dtype, batch)
    c, tokens = DTYPE_BYTES[dtype], batch.tokens(captured=captured)
    attended = Attended(
        kernel=choose_kernel(family, device, dtype, model.head_dim, dense=batch.dense)[0],
        q=model.n_heads * model.head_dim,
        kv=model.n_kv_heads * model.head_dim,
        head_dim=model.head_dim,
        tokens=tokens,
        documents=batch.documents(captured=captured),
        longest=min(tokens, batch.longest(captured=captured)),
        dense=batch.dense,
        window=bool(family.window),
        on_card=device.kind == "cuda",
        c=c,
    )
    return FusedLayer(
        family=family,
        shapes=model.linear_shapes,
        ranks=dict.fromkeys(targets(model, config), config.lora_r),
        c=c,
        tokens=tokens,
        attended=attended,
        quantized=quantized(model, config),
        dropout=config.lora_dropout > 0,
        reference=device.kind == "cpu" or not device.has_triton,
    )
