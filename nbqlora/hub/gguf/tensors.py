"""A model's tensors under llama.cpp's names, turned as llama.cpp wants them, a few rows at a time.

Names come from the gguf library. Two things are turned: rows of q and k, where llama.cpp rotates neighbours and
transformers the two halves of a head, and Gemma's norms. A tensor is never held whole: turning needs one head's rows,
everything else the piece that came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbqlora.core.errors import ModelError
from nbqlora.hub.gguf.families import GgufFamily, head_dim
from nbqlora.hub.gguf.quantizations import BLOCKS, Storage, storage
from nbqlora.hub.weights import WeightStream

Rows = np.ndarray[Any, Any]
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_SOURCE_OF_HEAD = "lm_head.weight"
# Buffers that old checkpoints hold; llama.cpp computes them.
_LEFT_OUT = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
# Quantizing keeps several copies of what it is given: fewer rows at a time keep them in the processor's cache.
_WEIGHTS_AT_ONCE = 1 << 19
_LARGEST_FP16 = 65504.0


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of the file.

    Args:
        name: llama.cpp's.
        source: its name in the stream.
        shape: rows first.
        weaves: rows of one head, when its rows are woven; 0 otherwise.
        adds_one: 1 is added to its values.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    storage: Storage
    weaves: int
    adds_one: bool


def plan_tensors(weights: WeightStream, family: GgufFamily, config: Any, quantization: str) -> list[Tensor]:
    """What is written, in the order in which it is read.

    Raises:
        ModelError: a tensor has no name in llama.cpp, or llama.cpp would not read it.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.arch), None)
    if arch is None:
        raise ModelError(f"this release of gguf does not know {family.arch}; a newer one does: pip install -U gguf")
    names = get_tensor_name_map(arch, int(config.num_hidden_layers))
    width = head_dim(config)
    planned = []
    for source in weights.names:
        if source.endswith(_LEFT_OUT):
            continue
        if family.head == "tied" and source == _SOURCE_OF_HEAD:
            raise ModelError(
                f"llama.cpp's {family.arch} takes the embedding as the head; this model has one of its own: {source}"
            )
        name = names.get_name(source, (".weight", ".bias"))
        if name is None or not name.endswith((".weight", ".bias")):
            raise ModelError(f"llama.cpp's {family.arch} has no tensor for {source}")
        planned.append(_tensor(weights, source, name, family, quantization, width))
    _check_whole(planned, int(config.num_hidden_layers))
    return _with_head(planned, family)


def _check_whole(planned: Sequence[Tensor], n_layers: int) -> None:
    """Every layer has the same tensors, none is there twice, and there is an embedding."""
    names = Counter(tensor.name for tensor in planned)
    if twice := [name for name, n in names.items() if n > 1]:
        raise ModelError(f"two tensors of the model are llama.cpp's {twice[0]}")
    in_layers = Counter(name.split(".", 2)[2] for name in names if name.startswith("blk."))
    if partly := [f"{part} in {n} of {n_layers} layers" for part, n in in_layers.items() if n != n_layers]:
        raise ModelError(f"the model is not whole: {partly[0]}")
    if _EMBEDDING not in names:
        raise ModelError("the model has no token embedding")


def _tensor(weights: WeightStream, source: str, name: str, family: GgufFamily, quantization: str, width: int) -> Tensor:
    part, suffix = name.split(".")[-2:]
    if suffix == "bias" and part not in family.biases:
        raise ModelError(f"llama.cpp's {family.arch} has no bias there: {source}")
    shape = weights.shape(source)
    if len(shape) not in (1, 2):
        raise ModelError(f"llama.cpp's {family.arch} has vectors and matrices only; {source} is {list(shape)}")
    return Tensor(
        name=name,
        source=source,
        shape=shape,
        storage=storage(shape, quantization, is_table=name in (_EMBEDDING, _HEAD)),
        weaves=width if family.weaves and part in ("attn_q", "attn_k") else 0,
        adds_one=family.adds_one and part.endswith("norm"),
    )


def _with_head(planned: list[Tensor], family: GgufFamily) -> list[Tensor]:
    """The head where llama.cpp looks for it: nowhere when it is tied, twice when llama.cpp knows no tied one."""
    by_name = {tensor.name: tensor for tensor in planned}
    if family.head == "stored" and _HEAD not in by_name:
        tied = by_name[_EMBEDDING]
        return [*planned, Tensor(**{**vars(tied), "name": _HEAD})]
    return planned


def embedding_rows(planned: Sequence[Tensor]) -> int:
    """Tokens that the model has an embedding for."""
    return next(tensor.shape[0] for tensor in planned if tensor.name == _EMBEDDING)


def stored_rows(weights: WeightStream, tensor: Tensor) -> Iterator[Rows]:
    """The bytes of a tensor's values, in order.

    Raises:
        ModelError: a value is not finite, or does not fit its type; or the stream gave other than it said.
    """
    n_rows = 0
    for rows in _turned(weights, tensor):
        at_once = max(1, _WEIGHTS_AT_ONCE // (rows.size // len(rows)))
        for begin in range(0, len(rows), at_once):
            yield _stored(rows[begin : begin + at_once], tensor)
        n_rows += len(rows)
    if n_rows != tensor.shape[0]:
        raise ModelError(f"{tensor.source} ended after {n_rows} of {tensor.shape[0]} rows")


def _stored(rows: Rows, tensor: Tensor) -> Rows:
    from gguf import GGMLQuantizationType, quants

    largest = float(np.abs(rows).max(initial=0.0))
    if not np.isfinite(largest):
        raise ModelError(f"{tensor.source} has values that are not finite: the model is broken")
    if tensor.storage.kind == "F16" and largest > _LARGEST_FP16:
        raise ModelError(f"{tensor.source} has a value of {largest:.3g}, too large for F16; BF16 and Q8_0 can hold it")
    return quants.quantize(np.ascontiguousarray(rows), GGMLQuantizationType[tensor.storage.kind])


def _turned(weights: WeightStream, tensor: Tensor) -> Iterator[Rows]:
    pieces = (piece.float().numpy() for piece in weights.pieces(tensor.source))
    for rows in _whole_heads(pieces, tensor.weaves) if tensor.weaves else pieces:
        if rows.shape[1:] != tensor.shape[1:]:
            raise ModelError(f"{tensor.source} came in rows of {rows.shape[1:]}, and it is {tensor.shape}")
        if tensor.weaves:
            halves = rows.reshape(-1, 2, tensor.weaves // 2, *rows.shape[1:])
            yield halves.swapaxes(1, 2).reshape(rows.shape)
        elif tensor.adds_one:
            yield rows + np.float32(1.0)
        else:
            yield rows


def _whole_heads(pieces: Iterator[Rows], width: int) -> Iterator[Rows]:
    """Rows regrouped so that every group is whole heads of ``width`` rows; what is left at the end comes as it is."""
    rest: Rows | None = None
    for piece in pieces:
        begin = 0
        if rest is not None:
            begin = min(width - len(rest), len(piece))
            rest = np.concatenate([rest, piece[:begin]])
            if len(rest) < width:
                continue
            yield rest
        whole = begin + (len(piece) - begin) // width * width
        if whole > begin:
            yield piece[begin:whole]
        # Copied: a piece is valid until the next one is taken.
        rest = piece[whole:].copy() if whole < len(piece) else None
    if rest is not None:
        raise ModelError(f"rows of q or k ended in the middle of a head: {len(rest)} of {width}")


def type_counts(planned: Sequence[Tensor]) -> dict[str, int]:
    """How many tensors have which type, the smallest type first."""
    counts = Counter(tensor.storage.kind for tensor in planned)
    order = sorted(counts, key=lambda kind: BLOCKS[kind][1] / BLOCKS[kind][0])
    return {kind: counts[kind] for kind in order}
