"""Miniatures of released shapes: small, of the same class, and enough to tell what packing does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from nbqlora.engine.packing import probe_packing
from nbqlora.hub.miniature import MAX_PARAMS, VOCAB, WINDOW, miniature
from nbqlora.run.layout import documents
from nbqlora.train.batch import end_to_end

# The sizes of the released models, as transformers' configs have them by default, and Qwen2.5's.
QWEN_7B = {
    "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
    "num_hidden_layers": 28,
}  # fmt: skip
EXACT = ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "qwen3_moe", "llama4_text", "smollm3", "lfm2"]
NOT = ["gpt_oss", "mamba2", "falcon_mamba", "bamba", "qwen3_next", "nemotron_h", "recurrent_gemma", "falcon", "mpt"]


def exact(config: Any) -> bool:
    small = miniature(config)
    assert small is not None
    tokens = torch.randint(1, VOCAB, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    collate = partial(end_to_end, pad_token_id=0, device=torch.device("cpu"))
    found = probe_packing(small, documents([tokens]), collate, context=torch.enable_grad, dtype=torch.float32)
    return found.exact


@pytest.mark.parametrize(("family", "expected"), [*((f, True) for f in EXACT), *((f, False) for f in NOT)])
def test_a_miniature_answers_for_its_family(family: str, expected: bool) -> None:
    assert exact(AutoConfig.for_model(family)) is expected


def test_sizes_that_share_few_divisors_shrink_too() -> None:
    config = AutoConfig.for_model("qwen2", **QWEN_7B)
    small = miniature(config)
    assert small is not None and sum(p.numel() for p in small.parameters()) < MAX_PARAMS / 10
    assert small.config.num_attention_heads % small.config.num_key_value_heads == 0
    assert config.hidden_size == 3584  # the config given is left as it was


def test_every_kind_of_layer_and_a_window_that_shows_are_kept() -> None:
    small = miniature(AutoConfig.for_model("gemma3_text"))
    assert set(small.config.layer_types) == {"sliding_attention", "full_attention"}
    assert small.config.sliding_window == WINDOW
    assert type(small).__name__ == "Gemma3ForCausalLM"


def test_random_numbers_of_the_run_are_not_touched() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    miniature(AutoConfig.for_model("llama"))
    assert torch.equal(torch.rand(3), expected)


def test_a_family_that_cannot_be_shrunk_gives_none() -> None:
    assert miniature(AutoConfig.for_model("nemotron")) is None
