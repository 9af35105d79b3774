"""The chunked loss is the model's own loss: same value, same gradient, for every head that HeadSpec knows."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nbqlora.core.specs import HeadSpec
from nbqlora.engine.head import chunked_loss, head_loss, head_loss_reference
from tests import tiny

VOCAB, WIDTH = 1000, 96
PLAIN = HeadSpec(tied=False)
HEADS = {
    "plain": PLAIN,
    "softcap": HeadSpec(tied=False, logit_softcap=2.0),
    "divisor": HeadSpec(tied=False, logit_divisor=8.0),
    "factor": HeadSpec(tied=False, logit_factor=0.0625),
    "all": HeadSpec(tied=False, bias=True, logit_softcap=1.5, logit_divisor=0.5, logit_factor=0.75),
}
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]


@pytest.fixture(autouse=True)
def nan_filled() -> Iterator[None]:
    """``torch.empty`` gives NaN, so that memory which nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def parts(n: int, *, bias: bool = False, seed: int = 0) -> Parts:
    """Hidden ``[n, WIDTH]``, weight ``[VOCAB, WIDTH]``, bias, targets ``[n]`` in fp32."""
    numbers = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, WIDTH, generator=numbers)
    weight = torch.randn(VOCAB, WIDTH, generator=numbers) * 0.2
    offset = torch.randn(VOCAB, generator=numbers) if bias else None
    return hidden, weight, offset, torch.randint(0, VOCAB, (n,), generator=numbers)


def value_and_gradient(
    loss: Callable[..., torch.Tensor], values: Parts, *rest: Any, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and its gradient with respect to hidden, both as fp64."""
    hidden, weight, bias, targets = values
    hidden = hidden.to(dtype).detach().requires_grad_()
    total = loss(hidden, weight.to(dtype), None if bias is None else bias.to(dtype), targets, *rest)
    total.backward()
    assert hidden.grad is not None and hidden.grad.dtype == dtype
    return total.detach().double(), hidden.grad.double()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, NaN when either has one."""
    return float((a - b).abs().max())


@pytest.mark.parametrize("chunk", [1, 64, 100, 4096])
@pytest.mark.parametrize("n", [1, 63, 255, 507])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_fp32_equals_the_reference(n: int, chunk: int, head: HeadSpec) -> None:
    values = parts(n, bias=head.bias)
    ours, slope = value_and_gradient(head_loss, values, head, chunk if n < 255 or chunk > 1 else 7)
    truth, true_slope = value_and_gradient(head_loss_reference, values, head, dtype=torch.float64)
    assert abs(ours - truth) <= 2e-6 * abs(truth)
    assert distance(slope, true_slope) <= 2e-5 * float(true_slope.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 63, 255, 507])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_half_precision_is_as_near_to_the_truth_as_eager(n: int, head: HeadSpec, dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = parts(n, bias=head.bias)
    rounded = (hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), targets)
    truth, true_slope = value_and_gradient(head_loss_reference, rounded, head, dtype=torch.float64)
    eager, eager_slope = value_and_gradient(head_loss_reference, rounded, head, dtype=dtype)
    ours, slope = value_and_gradient(head_loss, rounded, head, 100, dtype=dtype)
    unit = torch.finfo(dtype).eps
    assert abs(ours - truth) <= abs(eager - truth) + 0.1 * unit * abs(truth)
    assert distance(slope, true_slope) <= distance(eager_slope, true_slope) + unit * float(true_slope.abs().max())


@pytest.mark.parametrize("form", ["transposed", "every second", "expanded"])
def test_hidden_states_need_not_be_contiguous(form: str) -> None:
    hidden, weight, _, targets = parts(63)
    strange = {
        "transposed": hidden.t().contiguous().t(),
        "every second": torch.stack([hidden, hidden.new_full(hidden.shape, float("nan"))], dim=2)[:, :, 0],
        "expanded": hidden[:1].expand(63, WIDTH),
    }[form]
    assert not strange.is_contiguous()
    leaf = torch.zeros(63, WIDTH, requires_grad=True)
    total = head_loss(strange + 0 * leaf if form == "transposed" else strange, weight, None, targets, PLAIN, 16)
    expected = head_loss(strange.clone(memory_format=torch.contiguous_format), weight, None, targets, PLAIN, 16)
    assert torch.equal(total, expected)
    strange = strange.detach().requires_grad_()
    head_loss(strange, weight, None, targets, PLAIN, 16).backward()
    plain = strange.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    head_loss(plain, weight, None, targets, PLAIN, 16).backward()
    assert strange.grad is not None and plain.grad is not None
    assert distance(strange.grad, plain.grad) <= 1e-6


def test_nothing_supervised_is_a_differentiable_zero() -> None:
    _, weight, _, _ = parts(1)
    source = torch.randn(5, WIDTH, requires_grad=True)
    total = head_loss(source[:0], weight, None, torch.empty(0, dtype=torch.long), PLAIN, 64)
    total.backward()
    assert total.item() == 0 and source.grad is not None and torch.equal(source.grad, torch.zeros(5, WIDTH))


def test_a_batch_without_supervised_tokens_gives_zero_gradients() -> None:
    model = tiny.with_lora(tiny.make_model())
    batch = tiny.padded_batch()
    batch["labels"][:] = -100
    total, count = chunked_loss(PLAIN, 64)(model, batch)
    total.backward()
    assert total.item() == 0 and count.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in tiny.lora_parameters(model).values())


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    values = parts(63)
    with torch.no_grad():
        total = head_loss(*values, PLAIN, 16)
    assert not total.requires_grad
    assert torch.equal(total, head_loss(*values, PLAIN, 16))


def test_inputs_stay_as_they_were() -> None:
    hidden, weight, bias, targets = parts(63, bias=True)
    before = [t.clone() for t in (hidden, weight, targets)]
    head_loss(hidden.requires_grad_(), weight, bias, targets, HEADS["all"], 16).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden.detach(), weight, targets), strict=True))
