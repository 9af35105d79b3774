"""Documents end to end: which models keep them apart, found by the probe and by nothing else."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from nbqlora.engine.packing import PROBE_TOKENS, PackingProbe, probe_packing
from nbqlora.train.batch import end_to_end
from tests import tiny

collate = partial(end_to_end, pad_token_id=0, device=torch.device("cpu"))
APART = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen3": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "phi3": {},
    "lfm2": {},
}
LEAKING = {
    # transformers 5.23 builds gpt-oss's masks without the position ids.
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16, "expand": 2},
    "jamba": {"num_experts": 2, "num_experts_per_tok": 1},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 128},
}


def documents(*lengths: int) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(1, 256, (n,), generator=numbers).tolist() for n in lengths or PROBE_TOKENS]


def model(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {**tiny._SHAPE, "initializer_range": 0.08, **tiny.FAMILIES.get(family, {}), **changes}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).float()


def probe(of: Any, **changes: Any) -> PackingProbe:
    return probe_packing(
        of, **{"documents": documents(), "collate": collate, "context": nullcontext, "dtype": torch.float32, **changes}
    )


@pytest.mark.parametrize("family", APART)
def test_caps_windows_and_plain_attention_keep_documents_apart(family: str) -> None:
    found = probe(model(family, **APART[family]))
    assert found.exact, found.because
    assert found.because.startswith("probe: 3 documents end to end and alone, losses alike to ")


@pytest.mark.parametrize("family", LEAKING)
def test_states_and_masks_that_go_on_across_documents_are_found(family: str) -> None:
    found = probe(model(family, **LEAKING[family]))
    assert not found.exact
    assert found.because.startswith("documents leak: one moves the next one's losses by ")


def test_a_family_that_refuses_boundaries_is_quoted() -> None:
    found = probe(model("bamba", mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16))
    assert not found.exact
    assert "can't keep packed sequences apart" in found.because


class Leaky(torch.nn.Module):
    """A llama that adds a little of the token before, whatever document that belongs to."""

    def __init__(self, share: float, family: str = "llama") -> None:
        super().__init__()
        self.inner, self.share = model(family), share

    def forward(self, **inputs: Any) -> Any:
        embedded = self.inner.get_input_embeddings()(inputs.pop("input_ids"))
        embedded = embedded + self.share * embedded.roll(1, dims=1)
        return self.inner(inputs_embeds=embedded, **inputs)


@pytest.mark.parametrize("share", [1.0, 0.1, 0.01])
def test_a_model_made_to_leak_is_found_however_little(share: float) -> None:
    assert probe(model("llama")).exact
    found = probe(Leaky(share))
    assert not found.exact and "documents leak" in found.because


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tells_rounding_from_leaking(dtype: torch.dtype) -> None:
    context = partial(torch.autocast, "cpu", dtype=dtype)
    assert probe(model("llama"), context=context, dtype=dtype).exact
    assert not probe(Leaky(1.0), context=context, dtype=dtype).exact


def test_an_nf4_model_with_adapters_is_probed_as_it_trains(tiny_folder: Any) -> None:
    from nbqlora.engine.surgery import keep_linears_trainable

    nf4 = tiny.with_lora(tiny.load_nf4(tiny_folder)).train()
    keep_linears_trainable(nf4)
    before = {name: p.detach().clone() for name, p in tiny.lora_parameters(nf4).items()}
    found = probe(nf4)
    assert found.exact, found.because
    assert nf4.training
    after = tiny.lora_parameters(nf4)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in after.items())


def test_positions_that_go_on_are_refused() -> None:
    def going_on(documents: Any) -> dict[str, Any]:
        batch = collate(documents)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    assert probe(model("llama"), collate=going_on).because == "the position ids do not restart at each document"


def test_a_mask_of_ones_beside_the_positions_is_refused() -> None:
    def masked(documents: Any) -> dict[str, Any]:
        batch = collate(documents)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    assert probe(model("llama"), collate=masked).because == "an attention mask lies beside the position ids"


def test_gradients_that_differ_are_found() -> None:
    class Drifting(torch.nn.Module):
        """Right losses; the gradient of a joined batch is scaled."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model("llama")

        def forward(self, **inputs: Any) -> Any:
            output = self.inner(**inputs)
            if "position_ids" in inputs:
                output.logits = output.logits.detach() + 1.1 * (output.logits - output.logits.detach())
            return output

    found = probe(Drifting())
    assert not found.exact
    assert found.because.startswith("end to end is not as alone: losses alike to ")
    assert found.because.endswith(", gradients to 1e-01 only (probe)")
