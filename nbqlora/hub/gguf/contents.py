"""Everything in a GGUF file but the weights themselves, read and checked before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbqlora.hub.gguf.families import GgufFamily, activation, check_config, family_of, head_dim
from nbqlora.hub.gguf.file import Value
from nbqlora.hub.gguf.quantizations import BLOCKS
from nbqlora.hub.gguf.rope import positions
from nbqlora.hub.gguf.tensors import Rows, Tensor, embedding_rows, plan_tensors, type_counts
from nbqlora.hub.gguf.vocabulary import Vocabulary, read_vocabulary
from nbqlora.hub.inspect import read_tokenizer
from nbqlora.hub.weights import WeightStream

_PHI_3 = "phi-3"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What the file will say.

    Args:
        arch: llama.cpp's name for the family.
        values: numbers and texts by key; those of the architecture without its name.
        factors: small tensors that no checkpoint has, by name.
        tensors: the others, in the order of the file.
        notes: where llama.cpp and transformers part.
    """

    arch: str
    values: Mapping[str, Value]
    vocabulary: Vocabulary
    factors: Mapping[str, Rows]
    tensors: Sequence[Tensor]
    notes: tuple[str, ...]


def read_contents(weights: WeightStream, quantization: str, name: str) -> Contents:
    """Read config and tokenizer, and plan the tensors.

    Raises:
        ModelError: llama.cpp could not compute or tokenize this model as transformers does.
    """
    family, config = family_of(weights.config)
    check_config(family, config)
    placed = positions(family, config)
    tensors = plan_tensors(weights, family, config, quantization)
    rows = embedding_rows(tensors)
    tokenizer = read_tokenizer(str(weights.tokenizer_folder))
    vocabulary = read_vocabulary(tokenizer, config, weights.folder, rows)
    values: dict[str, Value] = {
        **_general(_name(name, vocabulary), quantization),
        **_shape(family, config, rows),
        **placed.values,
        **{key: float(getattr(config, setting)) for setting, key in family.scalars.items()},
    }
    notes = (*placed.notes, *vocabulary.notes, *_activation_notes(family, config), *_type_notes(tensors, quantization))
    return Contents(
        arch=family.arch,
        values=values,
        vocabulary=vocabulary,
        factors=placed.factors,
        tensors=tensors,
        notes=notes,
    )


def _general(name: str, quantization: str) -> dict[str, Value]:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    kind = "ALL_F32" if quantization == "F32" else f"MOSTLY_{quantization}"
    return {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(LlamaFileType[kind]),
        "general.quantization_version": int(GGML_QUANT_VERSION),
    }


def _name(name: str, vocabulary: Vocabulary) -> str:
    """A name by which llama.cpp treats spaces after special tokens as this tokenizer does: it goes by "phi-3"."""
    if vocabulary.special.strips_after:
        return name if _PHI_3 in name.lower() else f"{name} ({_PHI_3})"
    for spelled in ("phi-3", "phi3"):
        while (at := name.lower().find(spelled)) >= 0:
            name = f"{name[:at]}phi 3{name[at + len(spelled) :]}"
    return name


def _shape(family: GgufFamily, config: Any, rows: int) -> dict[str, Value]:
    width = head_dim(config)
    epsilon = config.layer_norm_eps if "rms" not in family.norm_key else config.rms_norm_eps
    return {
        "block_count": int(config.num_hidden_layers),
        "embedding_length": int(config.hidden_size),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": int(config.num_attention_heads),
        "attention.head_count_kv": int(config.num_key_value_heads),
        "attention.key_length": width,
        "attention.value_length": width,
        family.norm_key: float(epsilon),
        "vocab_size": rows,
    }


def _activation_notes(family: GgufFamily, config: Any) -> tuple[str, ...]:
    has, computed = activation(config), family.activations[0]
    return () if has == computed else (f"llama.cpp computes {computed} for this family's {has}",)


def _type_notes(tensors: Sequence[Tensor], quantization: str) -> tuple[str, ...]:
    """Said when some matrices are not of the type that was asked for."""
    block = BLOCKS[quantization][0]
    unfit = [t for t in tensors if len(t.shape) > 1 and t.shape[-1] % block]
    counts = type_counts(tensors)
    notes = []
    if unfit:
        notes.append(f"{len(unfit)} matrices are F16, such as {unfit[0].name}: their rows are no multiple of {block}")
    if quantization not in ("F32", "F16", "BF16", "Q8_0") and "Q8_0" in counts:
        notes.append(f"the embedding and the head are Q8_0, all other matrices {quantization}")
    return tuple(notes)
