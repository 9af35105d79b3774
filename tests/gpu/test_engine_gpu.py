"""The engine on a card: captured and eager steps, memory of graphs, the arena, the trainer's path."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import nbqlora
from nbqlora.core.errors import NonFiniteLossError
from nbqlora.core.events import StepEvent
from nbqlora.core.specs import BatchLayout, LayerPolicy
from nbqlora.engine.checkpoint import apply_policies
from nbqlora.engine.fused import engine_of
from nbqlora.engine.loaded import LoadedModel
from nbqlora.engine.optimize import optimize, restore
from nbqlora.memory.arena import DequantArena
from nbqlora.memory.workspaces import free_workspaces
from tests import tiny

pytestmark = pytest.mark.gpu
# A loss scale of 1,024 over a thousand tokens.
FACTOR = 1.0
KEEP, MLP, ALL = LayerPolicy.KEEP, LayerPolicy.RECOMPUTE_MLP, LayerPolicy.RECOMPUTE
OFFLOAD, JOIN = LayerPolicy.OFFLOAD, LayerPolicy.JOIN
SLOT_BYTES = 1024 * 1024 * 2
MIXES = {
    "keep": [KEEP] * 12,
    "recompute_mlp": [MLP] * 12,
    "recompute": [ALL] * 12,
    "offload": [OFFLOAD] * 12,
    "mixed": [OFFLOAD, JOIN, JOIN, OFFLOAD, JOIN, OFFLOAD, ALL, JOIN, ALL, MLP, KEEP, KEEP],
}


@pytest.fixture(autouse=True)
def nothing_of_other_tests() -> None:
    """Models are in cycles with their layers; a peak must not count one that a test before left to the collector."""
    gc.collect()
    torch.cuda.synchronize()
    free_workspaces()
    torch.cuda.empty_cache()


def loaded_model(folder: Any, **changes: Any) -> LoadedModel:
    options = {"max_length": 512, "per_device_train_batch_size": 2, "lora_r": 8, "gradient_checkpointing": "none"}
    loaded = nbqlora.load(str(folder), **{**options, **changes})
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    loaded.model.train()
    return loaded


def dense(seed: int, rows: int = 2, seq: int = 384) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 31000, (rows, seq), generator=numbers).cuda()
    labels = ids.clone()
    labels[:, : 40 + 10 * seed] = -100
    return {"input_ids": ids, "labels": labels}


def packed(seed: int, tokens: int = 700) -> dict[str, Any]:
    numbers = torch.Generator().manual_seed(seed)
    lengths = [int(n) for n in torch.randint(20, 160, (12,), generator=numbers)]
    lengths = lengths[: next(i for i in range(12) if sum(lengths[: i + 1]) > tokens - 170) + 1]
    ids = torch.randint(3, 31000, (1, sum(lengths)), generator=numbers).cuda()
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}


def gradients(loaded: LoadedModel, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    loaded.model.zero_grad(set_to_none=True)
    factor = torch.tensor(FACTOR, device="cuda")
    loss = loaded.micro_step()(batch, factor)
    adapters = engine_of(loaded.model).scratch.adapters
    return float(loss), adapters.all_gradients().clone()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("make", [dense, packed])
@pytest.mark.parametrize("mix", MIXES)
def test_captured_is_eager(mix: str, make: Any, dtype: str, medium_folder: Any) -> None:
    loaded = loaded_model(medium_folder, dtype=dtype)
    apply_policies(loaded.model, MIXES[mix], slot_bytes=SLOT_BYTES, mlp_tile_tokens=200 if mix == "mixed" else 0)
    step = loaded.micro_step()
    assert step.captures, step.eager_because
    batches = [make(seed) for seed in (0, 1, 2)]
    captured = step._captured
    eager = []
    for batch in batches:
        captured.release()  # a shape is eager the first time
        eager.append(gradients(loaded, batch))
        assert not captured._graphs
    for _ in range(2):
        for batch, (loss, gradient) in zip(batches, eager, strict=True):
            found = gradients(loaded, batch)
            assert found[0] == pytest.approx(loss, rel=1e-5)
            off = float((found[1] - gradient).norm() / gradient.norm())
            assert off < (2e-2 if dtype == "bf16" else 4e-3), off
    assert 1 <= len(captured._graphs) <= 3


def test_a_filling_longer_than_every_document(medium_folder: Any) -> None:
    loaded = loaded_model(medium_folder, dtype="bf16")
    data = replace(loaded.plan.data, max_tokens=40, layout=BatchLayout.PACKED)
    loaded.run_as(replace(loaded.plan, data=data))
    batch = {k: v.cuda() for k, v in tiny.packed_batch(lengths=(40, 33) * 9).items()}
    step = loaded.micro_step()
    filled = int(step.fix(batch)["boundaries"].diff().max())
    assert step.captures and filled > 40
    losses = [gradients(loaded, batch) for _ in range(4)]  # eager, captured, replayed twice
    junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    del junk
    losses += [gradients(loaded, batch) for _ in range(2)]
    for loss, gradient in losses:
        assert loss == pytest.approx(losses[0][0], rel=1e-5) and bool(gradient.isfinite().all())
        assert (gradient - losses[0][1]).norm() < 2e-2 * losses[0][1].norm()


def test_every_mix_is_the_same_step_and_offload_takes_less(medium_folder: Any) -> None:
    loaded = loaded_model(medium_folder, dtype="bf16")
    batch, peaks, expected = dense(1), {}, None
    for mix, policies in MIXES.items():
        loaded.release()
        apply_policies(loaded.model, policies, slot_bytes=SLOT_BYTES)
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            loss, gradient = gradients(loaded, batch)
            peaks[mix] = max(peaks.get(mix, 0), torch.cuda.max_memory_allocated())
        expected = expected or (loss, gradient)
        assert loss == pytest.approx(expected[0], rel=1e-5), mix
        assert (gradient - expected[1]).norm() < 1e-2 * expected[1].norm(), mix
    slab = engine_of(loaded.model).scratch.slab
    assert slab.pinned and slab.n_bytes == 3 * SLOT_BYTES
    one_input = 2 * 384 * 1024 * 2
    assert peaks["offload"] <= peaks["recompute"] - 9 * one_input
    assert peaks["recompute"] < peaks["recompute_mlp"] < peaks["keep"]


def test_captured_accumulates_and_matches_transformers(medium_folder: Any) -> None:
    loaded = loaded_model(medium_folder, dtype="bf16")
    batch = packed(5)
    for _ in range(2):
        gradients(loaded, batch)
    total, once = gradients(loaded, batch)
    loaded.micro_step()(batch, torch.tensor(FACTOR, device="cuda"))
    adapters = engine_of(loaded.model).scratch.adapters
    assert torch.allclose(adapters.all_gradients(), 2 * once, rtol=1e-3, atol=1e-6)
    named = {n: p.grad.clone() / 2 for n, p in tiny.lora_parameters(loaded.model).items()}
    restore(loaded.model)
    loaded.model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = loaded.model(**batch, use_cache=False).loss
    count = int((batch["labels"][:, 1:] != -100).sum())
    (loss * count * FACTOR).backward()
    assert total / count == pytest.approx(float(loss), rel=1e-2)
    for name, p in tiny.lora_parameters(loaded.model).items():
        assert (named[name] - p.grad).norm() < 6e-2 * p.grad.norm(), name


def test_dropout_is_drawn_anew_at_each_replay(medium_folder: Any) -> None:
    loaded = loaded_model(medium_folder, dtype="bf16", lora_dropout=0.2)
    batch = dense(1)
    losses = [gradients(loaded, batch)[0] for _ in range(6)]
    assert len(set(losses)) == len(losses) and max(losses) < 1.05 * min(losses)


def test_a_whole_step_learns_and_waits_for_nothing(medium_folder: Any) -> None:
    loaded = loaded_model(medium_folder, dtype="bf16")
    optimizer = loaded.optimizer(learning_rate=2e-3)
    batch = dense(3)
    losses = [float(loaded.train_step(optimizer, **batch)) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0] and all(map(math.isfinite, losses))


def test_release_gives_the_pool_back(medium_folder: Any) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    loaded = loaded_model(medium_folder, dtype="bf16")
    optimizer = loaded.optimizer(learning_rate=1e-3)
    for seed in (1, 1, 1):
        loaded.train_step(optimizer, **dense(seed))
    del optimizer
    held = torch.cuda.memory_reserved()
    loaded.release()
    restore(loaded.model)
    del loaded
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held
    # What is left is cuBLAS's: workspaces of the streams that it ran on.
    assert torch.cuda.memory_allocated() - before < 130 * 2**20


def test_two_models_two_streams_and_an_exception_leave_each_weight_its_own(medium_folder: Any) -> None:
    first, second = (loaded_model(medium_folder, dtype=d) for d in ("bf16", "fp16"))
    batch = dense(2)
    expected = []
    for loaded in (first, second):
        loaded.model.zero_grad(set_to_none=True)
        loss = loaded.model(**batch, use_cache=False).loss
        loss.backward()
        expected.append((float(loss), engine_of(loaded.model).scratch.adapters.all_gradients().clone()))
        loaded.model.zero_grad(set_to_none=True)
    with pytest.raises(ValueError, match="the arena was made for"):
        engine_of(first.model).scratch.arena.take(10**5, 10**5, torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    losses = []
    for stream, loaded in zip(streams, (first, second), strict=True):
        with torch.cuda.stream(stream):
            loss = loaded.model(**batch, use_cache=False).loss
            loss.backward()
            losses.append(loss)
    torch.cuda.synchronize()
    for loaded, loss, (value, gradient) in zip((first, second), losses, expected, strict=True):
        found = engine_of(loaded.model).scratch.adapters.all_gradients()
        assert float(loss) == pytest.approx(value, rel=1e-4)
        assert (found - gradient).norm() < 2e-2 * gradient.norm()
        # One for each of two streams.
        assert engine_of(loaded.model).scratch.arena.held_bytes == 2 * engine_of(loaded.model).scratch.arena.n_bytes


def test_the_arena_keeps_a_buffer_a_stream() -> None:
    arena = DequantArena(torch.device("cuda"), 1 << 20)
    here = arena.take(8, 8, torch.float32)
    with torch.cuda.stream(torch.cuda.Stream()):
        there = arena.take(8, 8, torch.float32)
    assert here.data_ptr() != there.data_ptr()
    assert arena.take(4, 4, torch.float16).data_ptr() == here.data_ptr()
    arena.free()
    assert arena.held_bytes == 0


def test_generate_with_a_cache_is_transformers_own(medium_folder: Any) -> None:
    loaded = loaded_model(medium_folder, dtype="bf16")
    loaded.model.eval()
    ids = dense(4, seq=40)["input_ids"]
    settings = {"max_new_tokens": 16, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours = loaded.model.generate(input_ids=ids, **settings)
        restore(loaded.model)
        assert torch.equal(loaded.model.generate(input_ids=ids, **settings), ours)
        optimize(loaded.model)
        assert torch.equal(loaded.model.generate(input_ids=ids, **settings), ours)


OPTIONS = {"max_length": 256, "effective_batch_size": 4, "lora_r": 8, "warmup_ratio": 0, "learning_rate": 1e-3}


def rows_of(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"say {i}", "completion": "sun moon river " * (5 + i % 7)} for i in range(n)]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", [{"packing": True}, {"packing": False}, {"packing": False, "padding_free": False}])
def test_the_trainer_captures_and_tells_every_step(layout: Any, dtype: str, medium_folder: Any, tmp_path: Any) -> None:
    told: list[StepEvent] = []
    options = {**OPTIONS, **layout, "num_train_epochs": 3, "dtype": dtype, "gradient_accumulation_steps": 2}
    run = nbqlora.finetune(
        model=str(medium_folder), data=rows_of(40), output_dir=str(tmp_path), **options,
        observe=lambda e: told.append(e) if isinstance(e, StepEvent) else None,
    )  # fmt: skip
    total = run.plan.total_steps
    assert [e.step for e in told] == list(range(1, total + 1))
    assert all(math.isfinite(e.loss) and e.grad_norm and math.isfinite(e.grad_norm) for e in told)
    assert sum(e.n_tokens for e in told) == 3 * run.plan.data.n_tokens
    assert told[-1].loss < told[0].loss
    run.free()
    assert run.report.measured_peak_bytes <= run.plan.predicted_peak_bytes * 1.01


def test_a_row_that_is_not_finite_is_named_a_step_later(tmp_path: Any) -> None:
    folder = tiny.save_model(tmp_path / "model", bad_token="~")
    rows = [{"prompt": "ab", "completion": "cd" * 20} for _ in range(24)]
    rows[17]["completion"] = "cd~" + "cd" * 18
    options = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "packing": False, "padding_free": False,
        "max_length": 64, "lora_r": 4, "dtype": "bf16", "lr_scheduler_type": "constant", "warmup_ratio": 0,
        "trl": {"train_sampling_strategy": "sequential"},
    }  # fmt: skip
    with pytest.raises(NonFiniteLossError, match=r"the loss of step 9 is not finite, on the data's rows 18;"):
        nbqlora.finetune(model=str(folder), data=rows, output_dir=str(tmp_path / "run"), **options)
    good = nbqlora.finetune(model=str(folder), data=rows[:16], output_dir=str(tmp_path / "good"), **options)
    assert len(good.report.steps) == 8
    kept, expected = ((tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in ("run", "good"))
    assert kept == expected, "the step that was not finite reached the adapter"
