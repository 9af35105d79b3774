"""What llama.cpp could not compute as transformers does is refused before a byte is written; old configs are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nbqlora.core.errors import ModelError
from nbqlora.hub.gguf import export_gguf
from nbqlora.hub.gguf.families import FAMILIES, family_of
from nbqlora.hub.gguf.rope import positions
from tests.hub.gguf.stream import FolderStream
from tests.hub.gguf.tiny_models import GEMMA_2, GEMMA_3, GRANITE, LLAMA_3, WINDOWS, YARN, save

BASE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another activation": ("llama", {"hidden_act": "gelu"}, "its MLP has gelu, and llama.cpp computes silu"),
    "dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "does not scale the rotary positions of a llama by 'dynamic'",
    ),
    "a rope of another family": ("qwen3", {"rope_parameters": LLAMA_3}, "by 'llama3' .*it knows default, linear, yarn"),
    "YaRN with mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 0.7}}, "knows YaRN without mscale"),
    "half a head": (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rotates whole heads of a llama",
    ),
    "other windows": (
        "gemma3_text",
        {**GEMMA_3, "layer_types": ["full_attention"] * 7},
        "its sliding windows are not in all layers but every 6th",
    ),
    "other layers without positions": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1]},
        "rotary positions are not left out in every 4th layer",
    ),
    "another scale of scores": (
        "gemma2",
        {**GEMMA_2, "query_pre_attn_scalar": 100},
        "query_pre_attn_scalar = 100, and llama.cpp divides the scores by the root of 16",
    ),
    "no cap": ("gemma2", {**GEMMA_2, "final_logit_softcapping": None}, "final_logit_softcapping is not set"),
    "a cap": (
        "gemma3_text",
        {**GEMMA_3, "final_logit_softcapping": 5.0},
        "final_logit_softcapping = 5.0, and it has None",
    ),
    "both ways": (
        "gemma3_text",
        {**GEMMA_3, "use_bidirectional_attention": True},
        "use_bidirectional_attention = True",
    ),
    "norms of q and k": ("cohere", {"use_qk_norm": True, "tie_word_embeddings": True}, "use_qk_norm = True"),
    "heads of another width": (
        "olmo2",
        {"head_dim": 32},
        "its heads are 128 wide together, and llama.cpp takes d_model",
    ),
    "a head where there is none": (
        "gemma",
        {"head_dim": 16, "tie_word_embeddings": False},
        "takes the embedding as the head; this model has one of its own",
    ),
    "a bias": (
        "qwen3",
        {"attention_bias": True, "head_dim": 32},
        "has no bias there: model.layers.0.self_attn.k_proj.bias",
    ),
    "a bias of the output": (
        "seed_oss",
        {"attention_out_bias": True, "head_dim": 32},
        "has no bias there: model.layers.0.self_attn.o_proj.bias",
    ),
    "another family": ("stablelm", {}, "a model of the kind stablelm cannot be exported to GGUF; it can be for cohere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    family, changes, message = REFUSED[case]
    folder = _save_any(tmp_path / "model", family, changes)
    target = tmp_path / "out" / "model.gguf"
    with pytest.raises(ModelError, match=message):
        export_gguf(FolderStream(folder), target)
    assert not target.parent.exists()


def test_all_of_a_config_is_told_at_once(tmp_path: Path) -> None:
    changes = {**GEMMA_2, "final_logit_softcapping": None, "query_pre_attn_scalar": 7}
    with pytest.raises(ModelError) as raised:
        export_gguf(FolderStream(save(tmp_path / "model", "gemma2", changes)), tmp_path / "model.gguf")
    assert str(raised.value).splitlines() == [
        "llama.cpp would not compute this gemma2 as transformers does:",
        "  final_logit_softcapping is not set, and llama.cpp would take a value of its own",
        "  query_pre_attn_scalar = 7, and llama.cpp divides the scores by the root of 16",
    ]


def test_a_tensor_without_a_name_is_refused(tmp_path: Path) -> None:
    stream = FolderStream(save(tmp_path / "model", "llama", {}))
    stream.names = (*stream.names, "model.layers.0.self_attn.extra.weight")
    with pytest.raises(ModelError, match=r"has no tensor for model\.layers\.0\.self_attn\.extra\.weight"):
        export_gguf(stream, tmp_path / "model.gguf")


def test_a_model_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    stream = FolderStream(save(tmp_path / "model", "llama", {}))
    names = stream.names
    stream.names = tuple(name for name in names if name != "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"the model is not whole: ffn_up\.weight in 2 of 3 layers"):
        export_gguf(stream, tmp_path / "model.gguf")
    stream.names = tuple(name for name in names if "embed" not in name)
    with pytest.raises(ModelError, match="the model has no token embedding"):
        export_gguf(stream, tmp_path / "model.gguf")


@pytest.mark.parametrize("layers", [46, 62])
def test_the_largest_gemmas_scale_scores_by_the_mean_width(layers: int) -> None:
    kind = {46: "gemma2", 62: "gemma3_text"}[layers]
    from nbqlora.hub.gguf.families import check_config

    # 128 wide heads, and scores as if they were 168 wide: Gemma 3 with 27B.
    given = {"hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128, "num_hidden_layers": layers}
    caps = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0} if layers == 46 else {}
    check_config(*family_of({"model_type": kind, **given, **caps, "query_pre_attn_scalar": 168}))
    with pytest.raises(ModelError, match="by the root of 168"):
        check_config(*family_of({"model_type": kind, **given, **caps, "query_pre_attn_scalar": 128}))


@pytest.mark.parametrize(
    ("kind", "old", "expected"),
    [
        (
            "llama",
            {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA_3.items() if k != "rope_theta"}},
            {"rope.freq_base": 5e5},
        ),
        (
            "qwen2",
            {
                "rope_theta": 1e6,
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
            },
            {
                "rope.freq_base": 1e6,
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 8192,
                "context_length": 32768,
            },
        ),
        (
            "gemma3_text",
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {
                "rope.freq_base": 1e6,
                "rope.freq_base_swa": 1e4,
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0,
                "attention.sliding_window": 4096,
            },
        ),
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 32768}, {"context_length": 4096}),
        (
            "qwen2",
            {"sliding_window": 4096, "use_sliding_window": False, "max_position_embeddings": 32768},
            {"context_length": 32768},
        ),
    ],
)
def test_configs_of_older_releases(kind: str, old: dict[str, Any], expected: dict[str, Any]) -> None:
    family, config = family_of({"model_type": kind, **BASE, **old})
    found = positions(family, config).values
    assert expected.items() <= found.items()
    assert {key for key in found if "scaling" in key} == {key for key in expected if "scaling" in key}


@pytest.mark.parametrize("original", [64, 8192])
def test_llama_3_factors_are_those_of_transformers(original: int) -> None:
    rope = {**LLAMA_3, "original_max_position_embeddings": original}
    config = AutoConfig.for_model("llama", **BASE, head_dim=128, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 5e5 ** -(np.arange(0, 128, 2) / 128)
    factors = positions(FAMILIES["llama"], config).factors["rope_freqs.weight"]
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-6)
    assert factors.min() == 1.0 and factors.max() == 8.0


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    stream = FolderStream(save(tmp_path / "model", "llama", {}))
    stream.config = {**stream.config, "hidden_size": "wide"}
    with pytest.raises(ModelError, match=r"cannot read the model's config\.json"):
        export_gguf(stream, tmp_path / "model.gguf")


def test_scalars_of_a_family_are_in_the_file(tmp_path: Path) -> None:
    from gguf import GGUFReader

    done = export_gguf(FolderStream(save(tmp_path / "model", "granite", GRANITE)), tmp_path / "m.gguf", name="My model")
    fields = GGUFReader(done.path).fields
    assert fields["general.name"].contents() == "My model"
    assert fields["granite.logit_scale"].contents() == 0.25
    assert fields["granite.residual_scale"].contents() == 0.5
    assert fields["granite.context_length"].contents() == 512


def _save_any(folder: Path, family: str, changes: dict[str, Any]) -> Path:
    if family in FAMILIES:
        if family == "gemma3_text" and "layer_types" not in changes:
            changes = {**changes, **WINDOWS}
        return save(folder, family, changes)
    save(folder, "llama", {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": family}))
    return folder
