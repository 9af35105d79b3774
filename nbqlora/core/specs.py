"""What is known before anything is loaded: the model, the machine, the data.

A plan is arithmetic on these three and the config; none of them holds a tensor, a module or a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from nbqlora.core.saving import Room


class LayerPolicy(Enum):
    """What one decoder layer keeps between its forward and its backward.

    KEEP: all that its backward needs. RECOMPUTE_MLP: all but the MLP's. RECOMPUTE: its input alone. OFFLOAD: its input
    in host memory. JOIN: nothing; its input is computed again from that of the layers before it, of which the nearest
    that does not join is RECOMPUTE or OFFLOAD.
    """

    KEEP = "keep"
    RECOMPUTE_MLP = "recompute_mlp"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"
    JOIN = "join"


class BatchLayout(Enum):
    """How the rows of a micro-batch lie beside each other.

    PACKED: rows are best-fitted into packs of ``max_length``, and the packs of a micro-batch laid end to end.
    JOINED: the rows of a micro-batch are laid end to end, without padding. PADDED: one below the other, each
    filled up to the longest.
    """

    PACKED = "packed"
    JOINED = "joined"
    PADDED = "padded"


class MemoryCategory(Enum):
    """Who holds the memory: the words that every plan, bar and report uses."""

    WEIGHTS = "weights"
    ADAPTER = "adapter"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    DEQUANT = "dequant"
    LOSS = "loss"
    THIS_PROCESS = "this_process"
    CONTEXT = "context"
    CACHE = "cache"
    LEAKED = "leaked"
    OTHER_PROCESSES = "other_processes"

    @property
    def label(self) -> str:
        """The word that a person reads."""
        return self.value.replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The output projection and the input embedding.

    Args:
        tied: the head shares the embedding's matrix.
        bias: the head has a bias vector.
        logit_softcap: logits are ``cap * tanh(logits / cap)``; None for none.
        logit_divisor: logits are divided by this (Granite), 1.0 for none.
        logit_factor: logits are multiplied by this (Cohere), 1.0 for none.
    """

    tied: bool
    bias: bool = False
    logit_softcap: float | None = None
    logit_divisor: float = 1.0
    logit_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder's shape, read from its config without weights.

    Args:
        name: as the user gave it.
        architecture: transformers' ``model_type``.
        linear_shapes: per layer, ``(out_features, in_features)`` of each linear by its name, of a typical layer.
        n_params: all parameters, a tied head counted once.
        n_linear_params: parameters of the layers' linears: those that NF4 stores and LoRA adapts.
        weights_dtype_bytes: bytes of one unquantized parameter as stored on disk.
        quantized: the checkpoint is already stored in 4 bits.
        mlp_alone: every layer has an MLP as a module of its own.
        download_bytes: size of the checkpoint's files, None when unknown.
        embedding_on_host: a plan keeps its input embedding in host memory; no config says so.
    """

    name: str
    architecture: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    n_params: int
    n_linear_params: int
    linear_shapes: Mapping[str, tuple[int, int]]
    head: HeadSpec
    weights_dtype_bytes: int = 2
    quantized: bool = False
    mlp_alone: bool = True
    max_positions: int | None = None
    download_bytes: int | None = None
    embedding_on_host: bool = False

    @property
    def tied(self) -> bool:
        """The head shares the embedding's matrix."""
        return self.head.tied


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """The machine as a plan sees it; any field may be injected, so a T4 can be planned for anywhere.

    Args:
        kind: ``"cuda"`` or ``"cpu"``; for a CPU, ``total_bytes`` and ``free_bytes`` are the process's RAM.
        free_bytes: what a run could take now: free on the card plus what this process holds only as cache.
        context_bytes: what the CUDA context (or, on a CPU, this process with its libraries) takes, measured.
        capability: compute capability, None on a CPU.
        has_bf16: bf16 arithmetic in hardware (capability 8.0 and above; emulation does not count).
        matmul_flops: measured dense matmul rate in operations a second at the training dtype; None = not measured.
        copy_bytes_per_second: measured rate of a copy, bytes read and written; None = not measured.
        link_bytes_per_second: what a card sends to the others in an all-reduce, measured; None = not measured.
        rooms: folders that files could go to, the output folder first; () when they were not looked at.
        notes: things worth saying in a plan ("2 cards, 1 is used").
    """

    kind: Literal["cuda", "cpu"]
    name: str
    total_bytes: int
    free_bytes: int
    context_bytes: int
    host_free_bytes: int
    disk_free_bytes: int
    capability: tuple[int, int] | None = None
    has_bf16: bool = False
    has_triton: bool = False
    n_devices: int = 1
    matmul_flops: float | None = None
    copy_bytes_per_second: float | None = None
    link_bytes_per_second: float | None = None
    rooms: tuple[Room, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataStats:
    """Token counts of the rendered data, after truncation.

    Args:
        n_rows: rows that will be trained on.
        n_sequences: what the loop sees: rows, or packs of rows.
        n_tokens: tokens of those rows.
        n_supervised_tokens: tokens that the loss counts.
        max_tokens: the longest row.
        percentiles: row length in tokens at 5, 25, 50, 75 and 95 %.
        n_truncated: rows cut at ``max_length``.
        n_skipped: rows left out, by reason.
        format: what the rows were found to be ("messages", "Alpaca: instruction, input, output").
        layout: how the rows of a micro-batch lie.
        layout_because: why, with what the probe measured.
        fingerprint: of all token ids and labels in order; "" when not known.
    """

    n_rows: int
    n_sequences: int
    n_tokens: int
    n_supervised_tokens: int
    max_tokens: int
    percentiles: tuple[int, int, int, int, int]
    n_truncated: int = 0
    n_skipped: Mapping[str, int] = field(default_factory=dict)
    n_eval_rows: int = 0
    source: str = ""
    format: str = ""
    layout: BatchLayout = BatchLayout.PADDED
    layout_because: str = ""
    fingerprint: str = ""

    @classmethod
    def full(cls, n_rows: int, tokens: int, **more: Any) -> DataStats:
        """Rows of one length, all of them learned: what is planned for where nothing was read."""
        n = n_rows * tokens
        return cls(
            n_rows=n_rows,
            n_sequences=n_rows,
            n_tokens=n,
            n_supervised_tokens=n,
            max_tokens=tokens,
            percentiles=(tokens,) * 5,
            **more,
        )

    @property
    def mean_tokens(self) -> float:
        """Mean row length in tokens."""
        return self.n_tokens / max(1, self.n_rows)
