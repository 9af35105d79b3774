"""Merging on a card: the same files as on the CPU, within 0.5 GiB of it, beside a model that is loaded."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch

from nbqlora.hub.merge_journal import damage
from nbqlora.hub.stored import open_model
from nbqlora.memory.workspaces import free_workspaces
from nbqlora.run.merging import MergeSettings, merge
from nbqlora.run.sources import MergeSource
from tests.hub.merging import save_base, save_lora

pytestmark = pytest.mark.gpu
MIB = 1 << 20


def merged(folder: Path, adapter: Path, target: Path, **settings: object) -> Path:
    source = MergeSource(folder=folder, adapters=(adapter,), dtype="bf16", model=settings.pop("model", None))
    report = merge(source, target, MergeSettings(**{"check": False, **settings}))
    assert report.device.startswith("cuda") and damage(target) == ""
    return target


def largest_difference(one: Path, other: Path) -> float:
    a, b = open_model(one), open_model(other)
    assert a.keys() == b.keys()
    return max(float((a[n].read().float() - b[n].read().float()).abs().max()) for n in a)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Weights of 128 MiB in bf16, and an adapter."""
    folder = tmp_path_factory.mktemp("wide")
    base = save_base(
        folder / "base", "llama", dtype=torch.bfloat16, hidden_size=4096, intermediate_size=16384, num_hidden_layers=1,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    return base, save_lora(base, folder / "adapter", r=16)


def test_it_takes_little_of_the_card(wide, tmp_path):
    base, adapter = wide
    free_workspaces()  # those of other tests: merging gives back all there are
    bitsandbytes.functional.quantize_4bit(torch.ones(64, device="cuda"), compress_statistics=True)  # keeps its table
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for kind in ("original", "nf4"):
        torch.cuda.reset_peak_memory_stats()
        merged(base, adapter, tmp_path / kind, base=kind)
        assert torch.cuda.max_memory_allocated() - before <= 512 * MIB
        assert torch.cuda.memory_allocated() == before


def test_a_full_card_leaves_it_to_the_cpu(wide, tmp_path):
    base, adapter = wide
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - 24 * MIB, dtype=torch.uint8, device="cuda")
    source = MergeSource(folder=base, adapters=(adapter,), dtype="bf16")
    report = merge(source, tmp_path / "merged", MergeSettings(check=False))
    del ballast
    torch.cuda.empty_cache()
    assert report.device == "cpu" and damage(tmp_path / "merged") == ""


def test_the_same_weights_as_on_the_cpu(wide, tmp_path, monkeypatch):
    base, adapter = wide
    on_card = merged(base, adapter, tmp_path / "card")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = MergeSource(folder=base, adapters=(adapter,), dtype="bf16")
    assert merge(source, tmp_path / "cpu", MergeSettings(check=False)).device == "cpu"
    # One unit in the last place of bf16 at the largest weights, where the sum is rounded the other way.
    assert largest_difference(on_card, tmp_path / "cpu") <= 2**-8


def test_what_the_loaded_model_holds_is_what_is_made_again(tmp_path):
    base = save_base(tmp_path / "base", "llama", dtype=torch.bfloat16)
    adapter = save_lora(base, tmp_path / "adapter")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=nf4, device_map={"": "cuda"}, dtype=torch.bfloat16
    )
    loaded = merged(base, adapter, tmp_path / "loaded", base="nf4", model=model)
    again = merged(base, adapter, tmp_path / "again", base="nf4")
    assert largest_difference(loaded, again) == 0
