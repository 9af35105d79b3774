"""What takes more memory, and what does not, in fused layers and in transformers' own."""

from __future__ import annotations

from typing import Any

import pytest

from nbqlora.core.specs import BatchLayout
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.estimate import budget
from tests.planner.shapes import DEVICES, MODELS, mix_of, options


def peak(
    model: str = "8B",
    *,
    rows: int = 2,
    tokens: int = 1024,
    keep: int = 8,
    mlp: int = 0,
    layout: BatchLayout = BatchLayout.PADDED,
    **changes: Any,
) -> int:
    config = options(max_length=tokens, **changes)
    batch = MicroBatch(rows=rows, row_tokens=tokens, supervised_tokens=rows * tokens, layout=layout)
    return budget(config, MODELS[model], DEVICES["H100"], "bf16", batch, mix_of(32, keep, mlp)).total_bytes


@pytest.mark.parametrize("model", ["8B", "stock 8B"])
@pytest.mark.parametrize(
    "how", [{}, {"layout": BatchLayout.PACKED}, {"lora_dropout": 0.05}, {"optim": "adamw_8bit"}], ids=str
)
def test_more_tokens_rank_rows_or_kept_layers_take_more(how: dict[str, Any], model: str) -> None:
    lengths = [peak(model, tokens=n, **how) for n in (64, 128, 512, 800, 1024, 4096, 16384)]
    ranks = [peak(model, lora_r=r, **how) for r in (1, 8, 16, 64, 256)]
    rows = [peak(model, rows=n, **how) for n in (1, 2, 3, 8)]
    keeps = [peak(model, keep=n, **how) for n in range(1, 33)]
    for series in (lengths, ranks, rows, keeps):
        assert series == sorted(series) and len(set(series)) == len(series)
    assert peak(model, keep=0, **how) <= peak(model, keep=2, **how)


def test_an_mlp_that_is_recomputed_takes_less_than_a_kept_layer_and_more_than_a_recomputed_one() -> None:
    for keep in range(1, 31):
        assert peak(keep=keep) < peak(keep=keep, mlp=1) < peak(keep=keep + 1)
        assert peak(keep=keep - 1, mlp=2) < peak(keep=keep, mlp=1)


@pytest.mark.parametrize("layout", [BatchLayout.PACKED, BatchLayout.JOINED])
def test_what_lies_end_to_end_attends_over_the_whole_batch_in_stock_layers(layout: BatchLayout) -> None:
    # A mask of (2 x 4096)**2 in place of 2 x 4096**2, once as bool and in each of 32 layers in two bytes.
    joined, padded = (peak("stock 8B", tokens=4096, keep=32, layout=which) for which in (layout, BatchLayout.PADDED))
    assert joined - padded == 2 * 4096**2 * (1 + 32 * 2)


def test_no_mask_is_counted_for_fused_layers() -> None:
    # Twice the tokens: twice as much beyond what stands, however they lie.
    for layout in BatchLayout:
        steps = [peak(tokens=n, keep=32, layout=layout) for n in (2048, 4096, 8192)]
        assert steps[2] - steps[1] == pytest.approx(2 * (steps[1] - steps[0]), rel=0.02)


def test_one_row_at_a_time_needs_no_mask_but_one_pack_does() -> None:
    alone, joined, packed = (peak("stock 8B", rows=1, layout=which) for which in reversed(BatchLayout))
    assert alone == joined < packed


def test_dropout_is_counted() -> None:
    # Stock: each of the seven adapters keeps its own input (5d + a + f) and a bool mask, where two were shared.
    d, f, tokens = 4096, 14336, 2048
    extra = (5 * d + d + f) * 3 - (2 * d + f) * 2
    stock = peak("stock 8B", keep=32, lora_dropout=0.05) - peak("stock 8B", keep=32)
    assert stock == 32 * tokens * extra
    # Fused: nothing is kept; down's adapter drops its input once more while its gradient is made.
    assert peak(keep=32, lora_dropout=0.05) - peak(keep=32) == tokens * f * 2
