"""Attention and capture as a plan says them, against what the engine chooses on the same card."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from nbqlora.core.families import FAMILIES
from nbqlora.core.plan import Plan
from nbqlora.core.specs import BatchLayout
from nbqlora.engine import attention as engine
from nbqlora.engine import micro_step
from nbqlora.engine.attention import choose_attention
from nbqlora.engine.fixed_batch import fixed_batch, longest_of
from nbqlora.planner import make_plan
from nbqlora.planner.attention import CAPTURED, WORKSPACE_BYTES, choose_kernel
from nbqlora.planner.batch import MicroBatch
from tests.planner.shapes import DEVICES, MODELS, cpu, options, rows_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CARDS = ((7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (10, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [*CARDS, None])
def test_kernel_and_reason_are_the_engines(
    capability: tuple[int, int] | None, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "lacks", lambda name: "")  # of torch's operators the plan knows nothing
    device = cpu() if capability is None else replace(DEVICES["T4"], capability=capability)
    for family, head_dim, dense in itertools.product(("llama", "gemma2"), (64, 100, 128, 256, 512), (True, False)):
        kernel, because = choose_kernel(FAMILIES[family], device, dtype, head_dim, dense=dense)
        kind, expected = choose_attention(
            device_type=device.kind,
            capability=capability,
            dtype=DTYPES[dtype],
            head_dim=head_dim,
            window=None,
            softcap=30.0 if family == "gemma2" else None,
            dense=dense,
        )
        assert (kernel.value, because) == (kind.value, expected)


def test_a_window_may_take_flash_where_cudnn_is_faster() -> None:
    said = choose_kernel(FAMILIES["mistral"], DEVICES["H100"], "bf16", 128, dense=True)[1]
    assert said == "cuDNN, flash in layers with a window: measured faster than flash on capability 9.0"
    joined = choose_kernel(FAMILIES["mistral"], DEVICES["H100"], "bf16", 128, dense=False)[1]
    assert joined == "flash, varlen: capability 9.0"


def test_families_that_cap_scores_are_those_that_do() -> None:
    from transformers import AutoConfig

    for name, family in FAMILIES.items():
        capped = getattr(AutoConfig.for_model(name), "attn_logit_softcapping", None) is not None
        assert family.caps_scores == capped, name


@pytest.mark.parametrize("most", [8, 64, 100, 500, 1000, 1024, 2050, 4096, 70000])
def test_a_captured_batch_is_filled_up_as_the_engine_fills_it(most: int) -> None:
    ids = torch.zeros(1, most, dtype=torch.int64)
    for documents in (1, 7, 8, 30):
        starts = torch.arange(documents).clamp(max=most)
        batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(most)[None]}
        if documents > 1:
            batch["cu_seq_lens_q"] = torch.cat([starts, torch.tensor([most])]).int()
        found = fixed_batch(batch, most_tokens=most, pad_token_id=0)
        layout = BatchLayout.PACKED if documents > 1 else BatchLayout.JOINED
        planned = MicroBatch(rows=1, row_tokens=most, supervised_tokens=1, layout=layout, n_documents=documents)
        assert planned.tokens(captured=True) == found["input_ids"].numel()
        if documents > 1:  # one more where the filling is none
            n = found["boundaries"].numel() - 1
            assert planned.documents(captured=True) in (n, 2 * n)
    padded = MicroBatch(rows=3, row_tokens=most, supervised_tokens=1)
    rows = {"input_ids": ids.expand(3, -1), "labels": ids.expand(3, -1)}
    assert padded.tokens(captured=True) == fixed_batch(rows, most_tokens=most, pad_token_id=0)["input_ids"].numel()
    assert padded.tokens(captured=False) == 3 * most


@pytest.mark.parametrize(("most", "longest"), [(1024, 40), (1024, 300), (4096, 40), (70000, 9000)])
def test_attention_is_planned_for_the_longest_document(most: int, longest: int) -> None:
    lengths = [longest] * (most // longest)
    ids = torch.zeros(1, sum(lengths), dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    batch["cu_seq_lens_q"] = torch.tensor([0, *lengths]).cumsum(0).int()
    found = fixed_batch(batch, most_tokens=most, pad_token_id=0, longest_document=longest)
    planned = MicroBatch(
        rows=1, row_tokens=most, supervised_tokens=1, layout=BatchLayout.PACKED, longest_document=longest
    )
    assert planned.longest(captured=True) == longest_of(longest, most) >= int(found["boundaries"].diff().max())
    assert planned.longest(captured=False) == longest and planned.longest(captured=True) < most


def test_filling_takes_time() -> None:
    alike = MicroBatch(rows=2, row_tokens=2050, supervised_tokens=1, ragged=False)
    assert alike.mean_tokens(2050, captured=True) == alike.tokens(captured=True) == 2 * 2240
    assert replace(alike, ragged=True).mean_tokens(1500, captured=True) == 2 * (1500 + 320 / 2)
    assert alike.mean_tokens(1500, captured=False) == 3000


def test_what_is_captured_is_what_the_engine_captures() -> None:
    assert {k.value for k in CAPTURED} == {k.value for k in micro_step.CAPTURED_KINDS}
    from nbqlora.engine import attention_groups

    assert WORKSPACE_BYTES == attention_groups.WORKSPACE_BYTES


def said(model: str = "8B", device: str = "H100", *, architecture: str | None = None, **changes: object) -> Plan:
    spec = replace(MODELS[model], architecture=architecture) if architecture else MODELS[model]
    data = replace(rows_of(512), layout=changes.pop("layout", BatchLayout.PADDED))
    return make_plan(options(max_length=512, **changes), spec, DEVICES[device], data, output_dir="out")


EAGER_CPU, BY_DOCUMENT = "a CPU has no graphs to capture", "its attention is computed document by document"
GRAPH = ("captured as a CUDA graph", "after the first of a shape")
RUNS = {
    "H100": ({}, ("cuDNN", "measured faster than flash on capability 9.0"), GRAPH),
    "packed": ({"layout": BatchLayout.PACKED}, ("flash, varlen", "capability 9.0"), GRAPH),
    "T4": ({"device": "T4"}, ("memory-efficient, keys expanded", "flash needs capability 8.0"), GRAPH),
    "bf16 on a T4": (
        {"device": "T4", "dtype": "bf16"},
        ("one causal SDPA a document", "flash needs capability 8.0; memory-efficient in bf16 needs capability 8.0"),
        ("eager", BY_DOCUMENT),
    ),
    "capped": (
        {"architecture": "gemma2"},
        ("written out, one document at a time", "no kernel caps scores"),
        ("eager", BY_DOCUMENT),
    ),
    "stock": ({"model": "stock 8B"}, None, ("eager", "not every layer is a fused one")),
}


@pytest.mark.parametrize("case", RUNS.values(), ids=RUNS)
def test_a_plan_says_how_it_runs(case: tuple[dict, tuple[str, str] | None, tuple[str, str]]) -> None:
    changes, attention, step = case
    found = {d.name: (d.value, d.because) for d in said(**changes).decisions}
    assert (found.get("attention"), found["step"]) == (attention, step)


def test_on_a_cpu() -> None:
    found = make_plan(options(max_length=64), MODELS["1B"], cpu(64), rows_of(64), output_dir="out")
    because = {d.name: (d.value, d.because) for d in found.decisions}
    assert because["attention"] == ("one causal SDPA a document", "a CPU")
    assert because["step"] == ("eager", EAGER_CPU)
    assert len(found.unknowns) == 1 and "C library" in found.unknowns[0]


def test_attention_is_unknown_in_stock_layers_only() -> None:
    unknown = "which attention kernel runs: counted as one that keeps expanded keys and values"
    assert said().unknowns == ()
    assert said("stock 8B").unknowns == (unknown,)


def test_rates_that_were_not_measured_are_unknown() -> None:
    data, device = rows_of(512), replace(DEVICES["T4"], matmul_flops=None)
    found = make_plan(options(max_length=512, vram_gib=6.5, ram_gib=6), MODELS["8B"], device, data, output_dir="out")
    assert found.step_seconds is None and found.host_bytes
    assert found.unknowns == (
        "how fast this device is: ways to run were compared by what they compute twice, not by seconds",
        "how fast inputs go to the host and back: 12 GB/s are counted, and RAM that can be pinned",
    )
