"""A whole step on fused layers: the plan's bytes against what the allocator hands out, on a CPU; the loss's chunk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.specs import BatchLayout, DeviceSpec, MemoryCategory
from nbqlora.engine.checkpoint import apply_policies
from nbqlora.engine.fused import engine_of
from nbqlora.engine.head import chunked_loss
from nbqlora.engine.optimize import optimize
from nbqlora.hub.inspect import read_spec
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.estimate import memory_of
from nbqlora.planner.fused_memory import FusedMemory
from nbqlora.planner.mix import Mix
from nbqlora.planner.standing import adapter_params
from nbqlora.planner.stock import StockMemory
from tests import tiny
from tests.planner.live_bytes import allocated_peak
from tests.planner.shapes import DEVICES, GIB, MODELS, cpu, mix_of, options

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}  # fmt: skip
MIB = 1 << 20
STEPS: dict[str, tuple[str, torch.dtype, str, dict[str, Any]]] = {
    "fp32": ("llama", torch.float32, "padded", {}),
    "fp32, packed": ("llama", torch.float32, "packed", {}),
    "fp32, a large vocabulary": ("llama", torch.float32, "padded", {"vocab_size": 20000}),
    "bf16": ("llama", torch.bfloat16, "padded", {}),
    "four norms": ("gemma3_text", torch.bfloat16, "padded", {}),
    "norms behind": ("olmo2", torch.float32, "packed", {}),
    "capped scores, capped logits, a large vocabulary": ("gemma2", torch.bfloat16, "padded", {"vocab_size": 20000}),
}


@dataclass
class Step:
    """A model of few layers with a batch, and the plan's memory of it."""

    model: Any
    spec: Any
    batch: dict[str, Any]
    dtype: torch.dtype
    memory: FusedMemory
    trace: Path

    def measured(self, mix: Mix) -> int:
        """Bytes of a step with these layers, beyond what stands; the second step is looked at."""
        apply_policies(self.model, mix.policies, slot_bytes=self.memory.input_bytes, mlp_tile_tokens=mix.tile_tokens)
        loss = chunked_loss(self.spec.head, self.memory.loss_chunk_tokens(mix))

        def work() -> None:
            half = self.dtype != torch.float32
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half, cache_enabled=False):
                total, count = loss(self.model, self.batch)
            (total / count).backward()

        work()  # buffers of gradients, of unpacked weights and of the host's are there from now on
        return allocated_peak(work, self.trace)

    def planned(self, mix: Mix) -> tuple[int, bool]:
        """The same by the plan, and whether the peak is in the loss."""
        parts = self.memory.budget(mix).by_category
        there = mix.offload * self.memory.input_bytes  # on a CPU the host's memory counts
        loss = parts.get(MemoryCategory.LOSS, 0)
        return parts[MemoryCategory.ACTIVATIONS] + loss - there, bool(loss)


def step_of(family: str, dtype: torch.dtype, kind: str, tmp_path: Path, **shape: Any) -> Step:
    head_dim = {"head_dim": 32} if "head_dim" in tiny.FAMILIES[family] else {}
    folder = tiny.save_model(tmp_path / family, family, **{**SHAPE, **head_dim, **shape})
    model, spec = tiny.with_lora(tiny.load_nf4(folder, dtype=dtype), r=16).train(), read_spec(family, str(folder))
    if family == "gemma2":
        model.set_attn_implementation("eager")
    optimize(model)
    batch = {"padded": tiny.padded_batch(rows=4, seq=128), "packed": tiny.packed_batch(lengths=(100, 28) * 4)}[kind]
    sizes = MicroBatch(
        rows=4,
        row_tokens=128,
        supervised_tokens=int((batch["labels"][:, 1:] != -100).sum()),
        layout=BatchLayout(kind),
        n_documents=8,
    )
    memory = memory_of(options(), spec, cpu(), "fp32" if dtype == torch.float32 else "bf16", sizes)
    assert isinstance(memory, FusedMemory)
    return Step(model, spec, batch, dtype, memory, tmp_path / "trace.json")


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_the_peak_of_a_step(case: Any, tmp_path: Path) -> None:
    family, dtype, kind, shape = case
    step = step_of(family, dtype, kind, tmp_path, **shape)
    for n_keep, n_mlp in ((4, 0), (2, 1), (1, 3), (0, 4), (0, 0)):
        mix = mix_of(4, n_keep, n_mlp)
        found, (expected, in_loss) = step.measured(mix), step.planned(mix)
        assert in_loss == ("vocab_size" in shape)
        assert 0.99 * found <= expected <= 1.05 * found, (mix, expected / found)


# Of eight layers, so that groups have several.
MIXES = {
    "offload": Mix(offload=8),
    "one offloads": Mix(offload=1, keep=7),
    "some of each": Mix(offload=3, recompute=2, recompute_mlp=2, keep=1),
    "joined, on the host": Mix(offload=2, join=6),
    "joined": Mix(recompute=2, join=6),
    "one group": Mix(recompute=1, join=7),
    "joined and kept": Mix(recompute=1, offload=1, join=4, recompute_mlp=1, keep=1),
    "tiles": Mix(recompute=8, tile_tokens=128),
    "tiles of some": Mix(recompute=3, recompute_mlp=4, keep=1, tile_tokens=64),
    "all at once": Mix(offload=2, join=4, recompute_mlp=2, tile_tokens=64),
}
HOW = {
    "fp32": ("llama", torch.float32, "padded"),
    "bf16, packed": ("llama", torch.bfloat16, "packed"),
    "four norms": ("gemma3_text", torch.float32, "packed"),
    "gate and up in one": ("phi3", torch.bfloat16, "padded"),
}


@pytest.mark.parametrize("names", [
    ("some of each", "joined, on the host", "joined", "all at once"), pytest.param(tuple(MIXES), marks=pytest.mark.slow)
], ids=["some", "all"])  # fmt: skip
@pytest.mark.parametrize("how", [
    HOW["fp32"], *(pytest.param(how, marks=pytest.mark.slow) for name, how in HOW.items() if name != "fp32")
], ids=HOW)  # fmt: skip
def test_the_peak_of_a_step_that_offloads_joins_and_runs_in_tiles(
    how: Any, names: tuple[str, ...], tmp_path: Path
) -> None:
    step = step_of(*how, tmp_path, num_hidden_layers=8)
    for name, mix in ((name, MIXES[name]) for name in names):
        found, (expected, _) = step.measured(mix), step.planned(mix)
        assert 0.99 * found <= expected <= 1.05 * found, (name, expected / found)


def test_adapters_and_arena_stand(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", **SHAPE)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        model, spec = tiny.with_lora(tiny.load_nf4(folder, dtype=dtype), r=16), read_spec("model", str(folder))
        optimize(model)
        engine = engine_of(model)
        assert engine is not None
        adapters, arena = engine.scratch.needed_adapters(), engine.scratch.arena
        memory = memory_of(options(), spec, cpu(), name, MicroBatch(rows=1, row_tokens=8, supervised_tokens=8))
        assert isinstance(memory, FusedMemory)
        copies = 0 if dtype == torch.float32 else adapters._copy.nbytes
        assert memory.standing[MemoryCategory.ADAPTER] == pytest.approx(adapters.master.nbytes + copies, rel=1e-3)
        assert memory.standing[MemoryCategory.GRADIENTS] == pytest.approx(adapters.all_gradients().nbytes, rel=1e-3)
        assert memory.standing[MemoryCategory.DEQUANT] == arena.n_bytes


def fused(
    model: str = "8B", device: DeviceSpec = DEVICES["H100"], *, rows: int = 2, tokens: int = 2048, share: float = 1.0
) -> FusedMemory:
    sizes = MicroBatch(rows=rows, row_tokens=tokens, supervised_tokens=int(rows * tokens * share), ragged=False)
    found = memory_of(options(), MODELS[model], device, "bf16" if device.has_bf16 else "fp16", sizes)
    assert isinstance(found, FusedMemory)
    return found


# max_memory_allocated on an H100 with torch 2.11, GiB (tests/bench/results/engine_h100.jsonl), and the loss's chunk.
# Those runs held 64 MiB of cuBLAS's workspaces twice, for eager and for captured steps.
TWICE = 64 * MIB
MEASURED = {
    "8B 2 x 2048, all kept": ("8B", "bf16", 16, 2, 2048, 32, 1024, 18.185),
    "8B 2 x 2048, all recomputed": ("8B", "bf16", 16, 2, 2048, 0, 1024, 7.757),
    "1B 4 x 2048": ("1B", "bf16", 16, 4, 2048, 16, 1024, 8.036),
    "1B 4 x 512": ("1B", "bf16", 16, 4, 512, 16, 256, 2.986),
}


@pytest.mark.parametrize("case", MEASURED.values(), ids=MEASURED)
def test_peaks_of_an_h100(case: Any) -> None:
    name, dtype, rank, rows, tokens, keep, chunk, measured = case
    sizes = MicroBatch(rows=rows, row_tokens=tokens, supervised_tokens=rows * tokens, ragged=False)
    memory = memory_of(options(lora_r=rank), MODELS[name], DEVICES["H100"], dtype, sizes)
    mix = mix_of(MODELS[name].n_layers, keep)
    assert memory.loss_chunk_tokens(mix) == chunk
    assert memory.total_bytes(mix) == pytest.approx(measured * GIB - TWICE, rel=0.002)


def test_a_chunk_of_the_loss_is_as_large_as_is_free() -> None:
    assert fused().loss_chunk_tokens(mix_of(32, 32)) == fused().loss_chunk_tokens(mix_of(32)) == 1024  # within 256 MiB
    for rows, tokens in ((1, 64), (1, 512), (2, 512), (4, 1024), (8, 4096)):
        for keep, mlp in ((32, 0), (0, 32), (0, 0), (10, 10)):
            memory = fused(rows=rows, tokens=tokens)
            mix = mix_of(32, keep, mlp)
            chunk = memory.loss_chunk_tokens(mix)
            logits = chunk * 128256 * 2
            assert chunk.bit_count() == 1 and 64 <= chunk <= 4096 and logits <= 256 * MIB
            in_loss = MemoryCategory.LOSS in memory.budget(mix).by_category
            assert not in_loss or logits <= 32 * MIB


def test_a_chunk_has_no_more_tokens_than_there_are() -> None:
    small = replace(MODELS["1B"], vocab_size=32000)
    for supervised, expected in ((1, 64), (64, 64), (65, 128), (700, 1024), (1024, 1024)):
        sizes = MicroBatch(rows=8, row_tokens=4096, supervised_tokens=supervised)
        assert memory_of(options(), small, DEVICES["H100"], "bf16", sizes).loss_chunk_tokens(mix_of(16, 16)) == expected


def test_without_triton_logits_have_copies_in_fp32() -> None:
    plain = fused(device=replace(DEVICES["H100"], has_triton=False))
    assert plain.logits == 128256 * (2 + 12) == 7 * fused().logits
    assert plain.total_bytes(mix_of(32, 32)) > fused().total_bytes(mix_of(32, 32))


def test_recomputing_more_never_takes_more() -> None:
    for model, device in (("8B", "H100"), ("1B", "T4"), ("13B", "T4")):
        memory, n = fused(model, DEVICES[device]), MODELS[model].n_layers
        for keep in range(n + 1):
            series = [memory.total_bytes(mix_of(n, keep - mlp, mlp)) for mlp in range(keep + 1)]
            assert series == sorted(series, reverse=True)


def test_which_layers_are_fused() -> None:
    sizes = MicroBatch(rows=1, row_tokens=64, supervised_tokens=64)
    for changes, kind in (
        ({}, FusedMemory), ({"peft": {"use_dora": True}}, StockMemory), ({"peft": {"lora_bias": True}}, StockMemory),
        ({"peft": {"bias": "all"}}, StockMemory), ({"peft": {"bias": "none", "use_rslora": True}}, FusedMemory),
    ):  # fmt: skip
        assert isinstance(memory_of(options(**changes), MODELS["8B"], DEVICES["T4"], "fp16", sizes), kind)
    assert isinstance(memory_of(options(), MODELS["stock 8B"], DEVICES["T4"], "fp16", sizes), StockMemory)


def test_a_captured_step_counts_the_gradients_of_other_shapes() -> None:
    sizes = MicroBatch(rows=2, row_tokens=1024, supervised_tokens=2048, ragged=False)
    ragged = memory_of(options(), MODELS["1B"], DEVICES["H100"], "bf16", replace(sizes, ragged=True))
    alone, kept = memory_of(options(), MODELS["1B"], DEVICES["H100"], "bf16", sizes), mix_of(16, 16)
    assert ragged.total_bytes(kept) - alone.total_bytes(kept) == 25 * 2048 * 2048 * 2 // 8


def test_an_8bit_optimizer_has_its_scales() -> None:
    n = adapter_params(MODELS["8B"], options())
    sizes = MicroBatch(rows=1, row_tokens=64, supervised_tokens=64)
    memory = memory_of(options(optim="adamw_8bit"), MODELS["8B"], DEVICES["T4"], "fp16", sizes)
    assert memory.standing[MemoryCategory.OPTIMIZER] == 2 * n + 2 * n // 64
