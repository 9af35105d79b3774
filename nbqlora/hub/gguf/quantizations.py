"""In how many bits a tensor is written, by the names that llama.cpp has for whole files.

The simple kinds are quantized here, a few rows at a time: each row is quantized by itself, so that pieces give the same
bytes as the whole. K-quants are llama.cpp's own work (:mod:`nbqlora.hub.gguf.quantizer`).

What is not the kind asked for, and why: norms and biases stay fp32, as llama.cpp computes them; with 4 and 5 bits
the embedding and the head have 8, since they are most of what rounding costs (llama.cpp's own files keep 6 or 8 there);
a row that no whole number of blocks fills stays fp16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nbqlora.core.errors import ModelError

# Weights and bytes of a block.
BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_1": (32, 24),
    "Q5_0": (32, 22),
    "Q4_1": (32, 20),
    "Q4_0": (32, 18),
}
_FEW_BITS = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1"})
# What llama.cpp's quantizer makes without a file of importances, with bits a weight of the layers, rounded up.
K_QUANTS: Mapping[str, float] = {
    "Q2_K": 3.0,
    "Q3_K_S": 3.5,
    "Q3_K_M": 4.0,
    "Q3_K_L": 4.4,
    "IQ4_XS": 4.5,
    "IQ4_NL": 4.7,
    "Q4_K_S": 4.7,
    "Q4_K_M": 5.0,
    "Q5_K_S": 5.6,
    "Q5_K_M": 5.8,
    "Q6_K": 6.6,
}
K_BLOCK = 256
# Where K-quants do not fit a row, llama.cpp takes up to 8 bits; so it may for the head.
K_FALLBACK_BITS = 8.5


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How one tensor is stored.

    Args:
        kind: the name of its type.
        n_bytes: of its values.
    """

    kind: str
    n_bytes: int


def check_name(name: str) -> str:
    """The quantization in llama.cpp's spelling. Raises :class:`ModelError` for one that there is not."""
    if name.upper() in BLOCKS or name.upper() in K_QUANTS:
        return name.upper()
    raise ModelError(
        f"no such quantization: {name!r}; there are {', '.join(BLOCKS)}, and with llama.cpp's quantizer "
        f"{', '.join(K_QUANTS)}"
    )


def storage(shape: Sequence[int], quantization: str, *, is_table: bool) -> Storage:
    """How to store a tensor of this shape.

    Args:
        quantization: one of :data:`BLOCKS`.
        is_table: the embedding or the head.
    """
    kind = "F32" if len(shape) == 1 else "Q8_0" if is_table and quantization in _FEW_BITS else quantization
    if shape[-1] % BLOCKS[kind][0]:
        kind = "F16"
    n_weights = 1
    for size in shape:
        n_weights *= size
    per_block, block_bytes = BLOCKS[kind]
    return Storage(kind=kind, n_bytes=n_weights // per_block * block_bytes)
