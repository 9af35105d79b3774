"""A 4-bit linear on a CPU keeps its backward, whatever ran in eval mode before.

On CPUs with AVX512-BF16 these tests fail without ``keep_linears_trainable``; elsewhere bitsandbytes never
repacks, so the switch itself is looked at.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit

from nbqlora.core.specs import HeadSpec
from nbqlora.engine.head import chunked_loss
from nbqlora.engine.surgery import keep_linears_trainable
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("tiny"))


def linears(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Linear4bit)]


def repacked(model: Any) -> int:
    return sum(bool(getattr(m.weight.quant_state, "packing_format_for_cpu", False)) for m in linears(model))


def evaluate(model: Any) -> None:
    model.eval()
    with torch.no_grad():
        chunked_loss(HeadSpec(tied=False), 16)(model, tiny.padded_batch())


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    total, count = chunked_loss(HeadSpec(tied=False), 16)(model, tiny.padded_batch())
    (total / count).backward()
    return {name: p.grad.clone() for name, p in tiny.lora_parameters(model).items()}


def test_an_evaluation_changes_no_gradient(folder: Path) -> None:
    fresh, evaluated = (tiny.with_lora(tiny.load_nf4(folder)) for _ in range(2))
    expected = gradients(fresh)
    keep_linears_trainable(evaluated)
    evaluate(evaluated)
    found = gradients(evaluated)
    assert expected.keys() == found.keys() and len(found) == 3 * 7 * 2
    assert all(torch.equal(found[name], g) for name, g in expected.items())
    assert all(g.any() for name, g in found.items() if "layers.0." in name)


def test_nothing_is_repacked_in_train_eval_train(folder: Path) -> None:
    model = tiny.with_lora(tiny.load_nf4(folder))
    keep_linears_trainable(model)
    for _ in range(2):
        gradients(model)
        evaluate(model)
        assert repacked(model) == 0


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no AVX512-BF16, so bitsandbytes repacks nothing")
def test_the_trap_is_there_without_it(folder: Path) -> None:
    # When this fails, bitsandbytes has given its CPU format a backward, and the surgery can go.
    model = tiny.with_lora(tiny.load_nf4(folder))
    expected = gradients(model)
    evaluate(model)
    assert repacked(model) == 3 * 7
    model.zero_grad()
    try:
        found = gradients(model)
    except (AttributeError, RuntimeError):
        return
    assert not all(torch.equal(found[name], g) for name, g in expected.items())


def test_what_was_switched_is_listed(folder: Path) -> None:
    model = tiny.load_nf4(folder)
    for module in linears(model):
        module.support_avx512bf16_for_cpu = True  # as bitsandbytes sets it on such a CPU
    (replacement,) = keep_linears_trainable(model)
    assert not any(m.support_avx512bf16_for_cpu for m in linears(model))
    assert (replacement.path, replacement.old, replacement.new) == ("21 4-bit linears", "repacked in eval mode", "kept")
    assert keep_linears_trainable(model) == ()


def test_a_model_without_4_bit_linears_is_left_alone() -> None:
    assert keep_linears_trainable(tiny.make_model()) == ()
