"""Answers in one batch are the answers one by one, whatever way the weights are multiplied."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from nbqlora.core.specs import HeadSpec, ModelSpec
from nbqlora.engine.generate import chat_text, generate, unpacked, unpacked_bytes
from nbqlora.engine.loaded import LoadedModel
from nbqlora.engine.surgery import keep_linears_trainable
from tests import tiny

PROMPTS = ["sun moon", "a", "river stone bird cloud tree salt", "What is the salt of the river?"]
PLENTY = 1 << 40
SPEC = ModelSpec(
    name="tiny", architecture="llama", n_layers=3, d_model=64, d_ff=128, n_heads=4, n_kv_heads=2, head_dim=16,
    vocab_size=300, n_params=0, n_linear_params=0, linear_shapes={}, head=HeadSpec(tied=False),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("tiny"), family="qwen2", initializer_range=0.25)


def loaded_with(model: Any, *, chat: bool = True) -> LoadedModel:
    keep_linears_trainable(model)
    device, tokenizer = torch.device("cpu"), tiny.make_tokenizer(chat=chat)
    return LoadedModel(model=model, tokenizer=tokenizer, spec=SPEC, device=device, dtype=torch.float32)


@pytest.fixture
def nf4(folder: Path) -> LoadedModel:
    return loaded_with(tiny.with_lora(tiny.load_nf4(folder)))


def alone(loaded: LoadedModel, prompt: str, n: int) -> str:
    """One prompt through transformers as its documentation says, without padding, mask or settings of ours."""
    ids = loaded.tokenizer(chat_text(loaded.tokenizer, prompt), return_tensors="pt", add_special_tokens=False)
    model = loaded.model.eval()
    with torch.no_grad():
        out = model.generate(input_ids=ids["input_ids"], max_new_tokens=n, do_sample=False, pad_token_id=256)
    return str(loaded.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("free_ram", [0, PLENTY], ids=["packed", "unpacked"])
def test_a_batch_answers_as_each_prompt_alone(nf4: LoadedModel, free_ram: int) -> None:
    expected = [alone(nf4, prompt, 24) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    assert generate(nf4, PROMPTS, max_new_tokens=24, free_ram_bytes=free_ram) == expected


def test_answers_end_at_the_end_token(nf4: LoadedModel) -> None:
    """A model that says "ok" and ends is not made to go on to the length of the longest answer."""
    head = nf4.model.get_output_embeddings()
    end = nf4.tokenizer.eos_token_id
    head.bias = torch.nn.Parameter(torch.zeros(300).index_fill_(0, torch.tensor([end]), 1e4), requires_grad=False)
    assert generate(nf4, PROMPTS, max_new_tokens=24) == [""] * len(PROMPTS)


def test_the_adapter_can_be_left_out(nf4: LoadedModel, folder: Path) -> None:
    base = loaded_with(tiny.load_nf4(folder))
    expected = [alone(base, prompt, 12) for prompt in PROMPTS]
    assert generate(nf4, PROMPTS, max_new_tokens=12, use_adapter=False) == expected
    assert generate(nf4, PROMPTS, max_new_tokens=12) != expected


def test_a_tokenizer_without_a_template_gets_the_prompt_itself(folder: Path) -> None:
    loaded = loaded_with(tiny.with_lora(tiny.load_nf4(folder)), chat=False)
    assert chat_text(loaded.tokenizer, "sun") == "sun"
    assert generate(loaded, PROMPTS, max_new_tokens=12) == [alone(loaded, p, 12) for p in PROMPTS]
    assert len(generate(loaded, ["", "sun"], max_new_tokens=4)) == 2


def test_nothing_to_answer(nf4: LoadedModel) -> None:
    assert generate(nf4, []) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_as_it_was(nf4: LoadedModel, training: bool) -> None:
    nf4.model.train(training)
    generate(nf4, ["sun"], max_new_tokens=2, free_ram_bytes=PLENTY)
    assert all(m.training is training for m in nf4.model.modules())
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in linears(nf4.model))


def linears(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Linear4bit)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**{k: v for k, v in tiny.padded_batch().items() if k != "labels"}).logits


def stored_in_bf16(folder: Path) -> Any:
    """A checkpoint that is stored in 4 bits, made in bf16, loaded for fp32."""
    stored = folder / "stored"
    if not stored.exists():
        tiny.load_nf4(folder, dtype=torch.bfloat16).save_pretrained(stored)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stored, device_map={"": "cpu"}, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in linears(model):
        module.compute_dtype = torch.float32
    return model


@pytest.mark.parametrize("make", [tiny.load_nf4, stored_in_bf16])
def test_unpacked_weights_give_the_same_logits(make: Callable[[Path], Any], folder: Path) -> None:
    model = make(folder).eval()
    keep_linears_trainable(model)
    expected = logits(model)
    with unpacked(model):
        found = logits(model)
    assert found.dtype == expected.dtype == torch.float32
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert torch.equal(logits(model), expected)


def test_unpacked_puts_every_forward_back(folder: Path) -> None:
    model = tiny.load_nf4(folder)
    first, *others = linears(model)

    def own(x: torch.Tensor) -> torch.Tensor:
        return x

    first.forward = own
    with pytest.raises(KeyError), unpacked(model):
        assert first.forward is not own and all("forward" in vars(m) for m in others)
        raise KeyError
    assert first.forward is own and not any("forward" in vars(m) for m in others)


def test_unpacked_bytes_are_those_of_the_weights(folder: Path) -> None:
    model = tiny.load_nf4(folder)
    assert unpacked_bytes(model) == 4 * (110_592)
    assert unpacked_bytes(tiny.load_nf4(folder, dtype=torch.bfloat16)) == 2 * (110_592)
    assert unpacked_bytes(tiny.make_model()) == 0
