"""Stock layers: the plan's bytes against what autograd saves and what the allocator hands out, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.specs import BatchLayout, DeviceSpec, LayerPolicy, MemoryCategory, ModelSpec
from nbqlora.engine.checkpoint import apply_policies, decoder_layers
from nbqlora.engine.head import chunked_loss
from nbqlora.engine.surgery import keep_linears_trainable
from nbqlora.hub.inspect import read_spec
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.layer import LAYOUTS, Attention, attention_of, layer_bytes, mlp_bytes, mlp_shapes
from nbqlora.planner.mix import Mix
from nbqlora.planner.standing import adapter_params
from nbqlora.planner.stock import StockMemory
from tests import tiny
from tests.planner.live_bytes import allocated_peak
from tests.planner.shapes import DEVICES, MODELS, mix_of

pytestmark = pytest.mark.usefixtures("one_thread")

PADDED, PACKED = BatchLayout.PADDED, BatchLayout.PACKED

RECOMPUTE, MLP = LayerPolicy.RECOMPUTE, LayerPolicy.RECOMPUTE_MLP
WIDE = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 2}
HEAD_DIM = {"qwen3": 32, "gemma2": 32, "gemma3_text": 32}
RANK = 16
BATCHES = {"padded": tiny.padded_batch(rows=2, seq=128), "packed": tiny.packed_batch(lengths=(100, 28, 90, 38))}
ONE = {"one row": tiny.padded_batch(rows=1, seq=128)}
# Families that have no fused layers, and those that keep transformers' own where their adapters are of another kind.
FAMILIES = ("cohere", "llama", *LAYOUTS)
Setting = tuple[Any, ModelSpec]


@pytest.fixture
def as_on_a_card() -> Iterator[None]:
    """PEFT asks whether autocast is on for CUDA; where it is not, every adapter casts its input anew."""
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Setting]:
    def loaded(family: str, dtype: torch.dtype, *, dropout: float = 0.0, **changes: Any) -> Setting:
        shape = {**WIDE, **({"head_dim": HEAD_DIM[family]} if family in HEAD_DIM else {}), **changes}
        folder = tiny.save_model(tmp_path_factory.mktemp(family), family, **shape)
        model = tiny.with_lora(tiny.load_nf4(folder, dtype=dtype), r=RANK, lora_dropout=dropout)
        keep_linears_trainable(model)
        return model.train(), read_spec(family, str(folder))

    return loaded


CHUNK = 128


def step(model: Any, spec: ModelSpec, batch: dict[str, Any], dtype: torch.dtype, chunk: int = CHUNK) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        total, count = chunked_loss(spec.head, chunk)(model, batch)
    return total / count


def saved_bytes(model: Any, spec: ModelSpec, batch: dict[str, Any], dtype: torch.dtype) -> dict[int | None, int]:
    """Bytes that autograd saves while each layer runs (None: outside of them), each storage once."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held: list[torch.Tensor] = []  # so that no address is used twice
    found: dict[int | None, int] = {}
    now: list[int | None] = [None]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held.append(tensor)
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            found[now[0]] = found.get(now[0], 0) + storage.nbytes()
        return tensor

    hooks = []
    for i, (_, layer) in enumerate(decoder_layers(model)):
        hooks.append(layer.register_forward_pre_hook(lambda *_, i=i: now.__setitem__(0, i)))
        hooks.append(layer.register_forward_hook(lambda *_: now.__setitem__(0, None)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step(model, spec, batch, dtype)
    for hook in hooks:
        hook.remove()
    return found


def predicted(spec: ModelSpec, batch: dict[str, Any], dtype: torch.dtype, **how: Any) -> float:
    """What the plan says that one layer saves, with autocast's copies of its adapter."""
    rows, seq = batch["input_ids"].shape
    how.setdefault("attention", Attention.MASKED if rows > 1 or "position_ids" in batch else Attention.CAUSAL)
    per_token = layer_bytes(spec, dtype.itemsize, RANK, row_tokens=seq, **how)
    casts = adapter_params(spec, config()) * 2 / spec.n_layers if dtype != torch.float32 else 0
    return per_token * rows * seq + casts


def config(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"model": "m", "data": "rows", "lora_r": RANK, **changes})


def check(found: dict[int | None, int], expected: float) -> None:
    """Middle and last layer; the first one's input needs no gradient, so it saves less."""
    for layer in (1, 2):
        assert 0.98 * found[layer] <= expected <= 1.15 * found[layer], expected / found[layer]
    assert found[0] <= found[1]


@pytest.mark.parametrize("batch", [*BATCHES.values(), *ONE.values()], ids=[*BATCHES, *ONE])
@pytest.mark.parametrize("shape", [{}, {"intermediate_size": 256}, {"num_key_value_heads": 8}], ids=str)
def test_llama_in_fp32(make: Callable[..., Setting], batch: dict[str, Any], shape: dict[str, int]) -> None:
    model, spec = make("llama", torch.float32, **shape)
    found = saved_bytes(model, spec, batch, torch.float32)
    expected = predicted(spec, batch, torch.float32, on_cpu=True)
    check(found, expected)
    assert expected == pytest.approx(found[1], rel=1e-6)  # every tensor is named


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_fp32(make: Callable[..., Setting], family: str) -> None:
    model, spec = make(family, torch.float32)
    batch = BATCHES["padded"]
    check(saved_bytes(model, spec, batch, torch.float32), predicted(spec, batch, torch.float32, on_cpu=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_bf16_as_on_a_card(make: Callable[..., Setting], family: str, as_on_a_card: None) -> None:
    model, spec = make(family, torch.bfloat16)
    batch = BATCHES["padded"]
    check(saved_bytes(model, spec, batch, torch.bfloat16), predicted(spec, batch, torch.bfloat16))


def test_every_layout_has_a_test() -> None:
    assert LAYOUTS.keys() <= tiny.FAMILIES.keys()


def test_bf16_on_a_cpu(make: Callable[..., Setting]) -> None:
    model, spec = make("llama", torch.bfloat16)
    batch = BATCHES["packed"]
    found = saved_bytes(model, spec, batch, torch.bfloat16)
    check(found, predicted(spec, batch, torch.bfloat16, on_cpu=True))


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_with_dropout(make: Callable[..., Setting], family: str) -> None:
    model, spec = make(family, torch.float32, dropout=0.1)
    batch = BATCHES["padded"]
    found = saved_bytes(model, spec, batch, torch.float32)
    check(found, predicted(spec, batch, torch.float32, on_cpu=True, dropout=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_sdpa_writes_out(make: Callable[..., Setting], dtype: torch.dtype, as_on_a_card: None) -> None:
    model, spec = make("llama", dtype)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = saved_bytes(model, spec, ONE["one row"], dtype)
    check(found, predicted(spec, ONE["one row"], dtype, attention=Attention.MATH))


def test_where_sdpa_writes_the_scores_out() -> None:
    def how(capability: tuple[int, int], rows: int = 1, model: str = "8B", layout: BatchLayout = PADDED) -> Attention:
        return attention_of(MODELS[model], replace(DEVICES["T4"], capability=capability), rows, layout)

    assert how((7, 5)) is Attention.MATH
    assert how((7, 5), model="13B") is Attention.CAUSAL  # as many keys as queries
    assert how((8, 0)) is Attention.CAUSAL
    assert how((7, 5), rows=2) is how((7, 5), layout=PACKED) is how((9, 0), rows=2) is Attention.MASKED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_recomputed_layer_saves_its_input(
    make: Callable[..., Setting], dtype: torch.dtype, batch: dict[str, Any]
) -> None:
    model, spec = make("llama", dtype)
    apply_policies(model, [RECOMPUTE] * 3)
    found = saved_bytes(model, spec, batch, dtype)
    assert [found[i] for i in range(3)] == [batch["input_ids"].numel() * spec.d_model * dtype.itemsize] * 3


@pytest.mark.parametrize("dtype,dropout", [(torch.float32, 0.0), (torch.float32, 0.1), (torch.bfloat16, 0.0)])
@pytest.mark.parametrize("family", ["cohere", "llama", "phi3", "gemma3_text"])
def test_a_layer_that_recomputes_its_mlp_saves_the_rest(
    make: Callable[..., Setting], family: str, dtype: torch.dtype, dropout: float, as_on_a_card: None
) -> None:
    model, spec = make(family, dtype, dropout=dropout)
    how = {"dropout": dropout > 0, "on_cpu": dtype == torch.float32}
    batch = BATCHES["padded"]
    whole = saved_bytes(model, spec, batch, dtype)
    apply_policies(model, [MLP] * 3)
    found = saved_bytes(model, spec, batch, dtype)
    mlp = mlp_bytes(spec, dtype.itemsize, RANK, **how) * batch["input_ids"].numel()
    # Autocast's copies of the MLP's adapters go with it.
    copies = 2 * RANK * sum(map(sum, mlp_shapes(spec).values())) if dtype != torch.float32 else 0
    expected = predicted(spec, batch, dtype, **how) - mlp - copies
    for layer in (1, 2):
        assert 0.98 * found[layer] <= expected <= 1.15 * found[layer], expected / found[layer]
        assert whole[layer] - found[layer] == pytest.approx(mlp + copies, rel=0.02)


DEVICE = {"total_bytes": 1 << 40, "free_bytes": 1 << 40, "host_free_bytes": 0, "disk_free_bytes": 0}
LAYOUT = {"padded": PADDED, "packed": PACKED}
PEAKS = {
    "fp32": ("llama", torch.float32, {}, "padded"),
    "fp32 packed": ("llama", torch.float32, {}, "packed"),
    "fp32, a large vocabulary": ("llama", torch.float32, {"vocab_size": 8000}, "padded"),
    "bf16": ("llama", torch.bfloat16, {}, "padded"),
    "bf16, a large vocabulary": ("llama", torch.bfloat16, {"vocab_size": 8000}, "padded"),
    "bf16, a narrow MLP": ("llama", torch.bfloat16, {"intermediate_size": 256}, "padded"),
    "bf16, a wide MLP": ("llama", torch.bfloat16, {"intermediate_size": 2048}, "padded"),
    "four norms": ("gemma3_text", torch.bfloat16, {}, "padded"),
    "capped logits, eager attention": ("gemma2", torch.float32, {"vocab_size": 8000}, "padded"),
}


@pytest.mark.parametrize("case", PEAKS.values(), ids=PEAKS)
def test_the_peak_of_a_step(make: Callable[..., Setting], case: Any, as_on_a_card: None, tmp_path: Path) -> None:
    family, dtype, shape, kind = case
    model, spec = make(family, dtype, num_hidden_layers=4, **shape)
    batch = {"padded": tiny.padded_batch(rows=4, seq=128), "packed": tiny.packed_batch(lengths=(100, 28) * 4)}[kind]
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    # The arithmetic of a card, where PEFT and autocast get along; the memory is this CPU's.
    device = DeviceSpec(kind="cuda", name="", context_bytes=0, **DEVICE)
    sizes = MicroBatch(rows=4, row_tokens=128, supervised_tokens=supervised, layout=LAYOUT[kind])
    memory = StockMemory(config=config(), model=spec, device=device, batch=sizes, c=dtype.itemsize)
    chunk = memory.loss_chunk_tokens()
    gradients = 4 * adapter_params(spec, config())
    more = (Mix(offload=4), Mix(recompute_mlp=4), Mix(offload=1, recompute=1, recompute_mlp=1, keep=1))
    for mix in (*(mix_of(4, n_keep) for n_keep in (4, 2, 0)), *(more if not shape else ())):
        apply_policies(model, mix.policies, slot_bytes=memory.input_bytes)

        def work() -> None:
            step(model, spec, batch, dtype, chunk).backward()

        work()  # gradients are there, as in all but a step's first micro-batch
        found = gradients + allocated_peak(work, tmp_path / "trace.json")
        parts = memory.budget(mix).by_category
        standing = (MemoryCategory.WEIGHTS, MemoryCategory.ADAPTER, MemoryCategory.OPTIMIZER, MemoryCategory.CONTEXT)
        expected = sum(n for category, n in parts.items() if category not in standing)
        assert 0.98 * found <= expected <= 1.15 * found, (mix, expected / found)
