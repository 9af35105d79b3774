"""Which loss a model gets: the chunked one where it is the model's own, else the model's own, with the reason."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from nbqlora.core.specs import HeadSpec
from nbqlora.engine.head import choose_loss, own_logits_loss
from tests import tiny

PLAIN = HeadSpec(tied=False)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, NaN when either has one."""
    return float((a - b).abs().max())


def spec_of(model: Any) -> HeadSpec:
    """The HeadSpec that a run would read from this model's config."""
    from nbqlora.hub.inspect import _head

    return _head(model.config, model.get_output_embeddings())


def choose(model: Any, *, dtype: torch.dtype = torch.float32, head: HeadSpec | None = None) -> Any:
    context = torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else nullcontext()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return choose_loss(model, head or spec_of(base), 64, torch.device("cpu"), context, dtype)


@pytest.mark.parametrize("batch", [tiny.padded_batch(), tiny.packed_batch()], ids=["padded", "packed"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_gets_the_chunked_loss_and_it_is_its_own_loss(family: str, batch: dict[str, Any]) -> None:
    model = tiny.with_lora(tiny.make_model(family))
    loss, replacement = choose(model)
    assert replacement.new == "chunked loss of supervised tokens", replacement.because
    total, count = loss(model, batch)
    (total / count).backward()
    ours = {name: p.grad.clone() for name, p in tiny.lora_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    own = model(**batch, use_cache=False).loss
    own.backward()
    assert float(total.detach() / count) == pytest.approx(own.item(), rel=2e-6)
    assert ours.keys() == tiny.lora_parameters(model).keys()
    largest = max(float(g.abs().max()) for g in ours.values())
    assert all(distance(ours[name], p.grad) <= 2e-5 * largest for name, p in tiny.lora_parameters(model).items())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_gets_the_chunked_loss_in_bf16(family: str) -> None:
    assert choose(tiny.with_lora(tiny.make_model(family).bfloat16()), dtype=torch.bfloat16)[1].new


class Doubled(LlamaForCausalLM):  # type: ignore[misc]
    """Does something to its logits that no config says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels", None)
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
        return out


class Scaled(torch.nn.Module):
    """A head inside another module."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden) * 0.5


def doubled() -> Any:
    model = tiny.make_model()
    model.__class__ = Doubled
    return tiny.with_lora(model)


def wrapped() -> Any:
    model = tiny.make_model()
    model.lm_head = Scaled(model.lm_head)
    return tiny.with_lora(model, target_modules=["q_proj", "down_proj"])


def lora_on_the_head() -> Any:
    return tiny.with_lora(tiny.make_model(), target_modules=["q_proj", "lm_head"])


def trained_head() -> Any:
    model = tiny.with_lora(tiny.make_model())
    model.get_output_embeddings().weight.requires_grad_()
    return model


OTHERS = {
    "logits doubled": (doubled, "on a probe its logits differ from the model's own by"),
    "wrapped head": (wrapped, "the head is test_choose_loss's Scaled, not torch's Linear"),
    "LoRA on the head": (lora_on_the_head, "the head is peft's Linear, not torch's Linear"),
    "trained head": (trained_head, "the head is trained, and the chunked loss gives it no gradient"),
}


@pytest.mark.parametrize("make,because", OTHERS.values(), ids=OTHERS)
def test_any_other_head_keeps_its_own_loss(make: Callable[[], Any], because: str) -> None:
    model, batch = make(), tiny.padded_batch()
    loss, replacement = choose(model)
    assert loss is own_logits_loss
    assert (replacement.path, replacement.old, replacement.new) == ("lm_head", "loss from all logits", "")
    assert replacement.because.startswith(because)
    total, count = loss(model, batch)
    (total / count).backward()
    ours = {name: p.grad.clone() for name, p in tiny.lora_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    own = model(**batch, use_cache=False).loss
    own.backward()
    assert float(total.detach() / count) == pytest.approx(own.item(), rel=2e-6)
    assert ours.keys() == tiny.lora_parameters(model).keys()
    assert all(distance(ours[name], p.grad) <= 1e-5 for name, p in tiny.lora_parameters(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [{"logit_divisor": 2.0}, {"logit_factor": 3.0}, {"logit_softcap": 1.0}], ids=str)
def test_a_wrong_head_spec_is_noticed_at_any_loss(wrong: dict[str, float], dtype: torch.dtype) -> None:
    # Nearly flat logits: every head's loss is log(300), whatever is done to them.
    model = tiny.with_lora(tiny.make_model(initializer_range=0.03).to(dtype))
    assert choose(model, dtype=dtype, head=PLAIN)[0] is not own_logits_loss
    replacement = choose(model, dtype=dtype, head=HeadSpec(tied=False, **wrong))[1]
    assert replacement.because.startswith("on a probe its logits differ from the model's own by")


def test_the_probe_leaves_the_mode_as_it_was() -> None:
    for training in (True, False):
        model = tiny.with_lora(tiny.make_model()).train(training)
        choose(model)
        assert model.training is training
        assert all(p.grad is None for p in model.parameters())
