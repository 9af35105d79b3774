"""Batches in few shapes: nothing that is learned changes, and the number of shapes is bounded."""

from __future__ import annotations

import pytest
import torch

from nbqlora.engine.fixed_batch import LEAST_DOCUMENTS, SHAPES, fixed_batch, longest_of, supervised
from nbqlora.engine.fused import engine_of
from nbqlora.engine.head import chunked_loss
from nbqlora.engine.optimize import optimize
from nbqlora.train.batch import documents, in_few_shapes
from tests.engine.test_choose_loss import spec_of
from tests.engine.test_fused_families import assert_same, family_model, loss_and_gradients
from tests.tiny import packed_batch, padded_batch


def fixed(batch: dict[str, torch.Tensor], most_tokens: int = 512) -> dict[str, torch.Tensor]:
    return fixed_batch(batch, most_tokens=most_tokens, pad_token_id=256)


def test_a_pack_is_filled_up_with_a_document_of_its_own() -> None:
    batch = packed_batch(lengths=(9, 14, 5))
    found = fixed(batch)
    assert found["input_ids"].shape == (1, 64)
    assert found["boundaries"].tolist() == [0, 9, 23, 28, 64, 64, 64, 64, 64]
    assert found["boundaries"].dtype == torch.int32 and found["boundaries"].numel() == LEAST_DOCUMENTS + 1
    assert torch.equal(found["input_ids"][:, :28], batch["input_ids"]) and (found["input_ids"][:, 28:] == 256).all()
    assert (found["labels"][:, 28:] == -100).all()
    assert found["position_ids"][0, 28:].tolist() == list(range(36))


@pytest.mark.parametrize("most_tokens", [64, 700, 4096])
def test_the_filling_is_no_longer_than_attention_is_told(most_tokens: int) -> None:
    for n in range(5, min(most_tokens, 900), 41):
        lengths = (3,) * (n // 3) + (2,)
        found = fixed_batch(packed_batch(lengths=lengths), most_tokens=most_tokens, pad_token_id=0, longest_document=3)
        assert int(found["boundaries"].diff().max()) <= longest_of(3, most_tokens)


def test_a_document_longer_than_any_should_be_is_an_error() -> None:
    batch = packed_batch(lengths=(9, 14, 5))
    fixed_batch(batch, most_tokens=512, pad_token_id=0, longest_document=14)
    with pytest.raises(ValueError, match="a document of 14 tokens, where none has more than 13"):
        fixed_batch(batch, most_tokens=512, pad_token_id=0, longest_document=13)


def test_rows_are_padded_further_on_the_right() -> None:
    batch = padded_batch(rows=3, seq=24)
    found = fixed(batch)
    assert found["input_ids"].shape == (3, 64) and "boundaries" not in found
    assert found["position_ids"][2].tolist() == list(range(64))
    assert (found["labels"] != -100).sum() == (batch["labels"] != -100).sum()


def test_what_is_learned_is_found_with_the_token_before_it() -> None:
    labels = torch.tensor([[-100, 5, 6, -100], [7, -100, -100, 8]])
    places, targets = supervised(labels)
    assert places.tolist() == [0, 1, 6] and targets.tolist() == [5, 6, 8]


def test_there_are_few_shapes() -> None:
    shapes = {tuple(fixed(packed_batch(lengths=(n, 7)), 4096)["input_ids"].shape) for n in range(2, 4000, 37)}
    assert len(shapes) <= SHAPES
    assert {s[1] % 64 for s in shapes} == {0}


@pytest.mark.parametrize("n", [1, 7, 8, 9, 15, 40])
def test_documents_are_counted_in_powers_of_two(n: int) -> None:
    found = fixed(packed_batch(lengths=(3,) * n)) if n > 1 else fixed(packed_batch(lengths=(3, 4)))
    count = found["boundaries"].numel() - 1
    assert count >= min(n, LEAST_DOCUMENTS) and count & (count - 1) == 0
    assert found["boundaries"].diff().sum() == found["input_ids"].numel() and (found["boundaries"].diff() >= 0).all()


@pytest.mark.parametrize("batch", [packed_batch(lengths=(19, 24, 1, 7)), padded_batch(rows=3)])
def test_loss_and_gradients_are_those_of_the_batch_as_it_was(batch: dict[str, torch.Tensor]) -> None:
    model = family_model("llama")
    optimize(model)
    loss_of = chunked_loss(spec_of(model.get_base_model()), 64)

    def run(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        total, count = loss_of(model, inputs)
        (total / count).backward()
        return (total / count).detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    keys = ("input_ids", "labels", "position_ids")
    assert_same(run({k: v for k, v in fixed(batch).items() if k in keys}), run(batch))
    assert engine_of(model) is not None
    assert loss_and_gradients(model, batch)


def test_a_collators_batch_says_its_tokens_and_gives_its_documents_back() -> None:
    rows = padded_batch(rows=3)
    padded = in_few_shapes(lambda _: rows, fixed)([])
    assert padded["n_tokens"] == int(rows["attention_mask"].sum())
    assert [len(ids) for ids, _ in documents(padded)] == rows["attention_mask"].sum(1).tolist()
    pack = packed_batch(lengths=(9, 14, 5))
    joined = in_few_shapes(lambda _: pack, fixed)([])
    assert joined["n_tokens"] == 28
    assert [ids.tolist() for ids, _ in documents(joined)][:3] == [ids.tolist() for ids, _ in documents(pack)]
