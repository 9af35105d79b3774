"""Merging under real limits: little RAM, a kill at any moment, a base that goes away while it is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.errors import ModelError, OutOfDiskError
from nbqlora.hub.merge import work_folder
from nbqlora.hub.merge_journal import damage
from nbqlora.hub.stored import open_model
from tests.hub import kill_merges
from tests.hub.merging import merge_tiny, plain_logits, save_base, save_lora

IDS = torch.arange(3, 40)[None]
# Merges within so much more data than the process has once all is imported; prints what it took.
LIMITED = """
import json, resource, sys
from pathlib import Path
import torch, transformers, peft, bitsandbytes
from nbqlora.run.merging import MergeSettings, merge
from nbqlora.run.sources import MergeSource
torch.set_num_threads(1)
import bitsandbytes.functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer
bitsandbytes.functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4")  # imports what compiles
folder, target, more, settings = json.loads(sys.argv[1])

def status(key):
    return int(dict(line.split(":", 1) for line in open("/proc/self/status"))[key].split()[0]) * 1024

source = MergeSource(folder=Path(folder, "base"), adapters=(Path(folder, "adapter"),), dtype="fp32")
if more:
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + more,) * 2)
before = status("VmRSS")
report = merge(source, Path(target), MergeSettings(**settings))
print(json.dumps({"ram_bytes": status("VmHWM") - before, **report.as_dict()}))
"""
MIB = 1 << 20


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer whose three largest weights are 128 MiB each, and an adapter."""
    folder = tmp_path_factory.mktemp("wide")
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests import tiny

    config = AutoConfig.for_model(
        "llama", vocab_size=tiny.VOCAB, hidden_size=1024, intermediate_size=32768, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    tiny.make_tokenizer().save_pretrained(folder / "base")
    tiny.with_lora(model, r=2).save_pretrained(folder / "adapter")
    assert max(t.n_bytes for t in open_model(folder / "base").values()) == 128 * MIB
    return folder


def limited(folder: Path, target: Path, more: int, **settings: Any) -> dict[str, Any]:
    arguments = json.dumps([str(folder), str(target), more, {"dtype": "fp32", **settings}])
    done = subprocess.run([sys.executable, "-c", LIMITED, arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("base", ["original", "nf4"])
def test_within_less_than_one_tensor(base: str, wide: Path, tmp_path: Path) -> None:
    # Whole tensors would take three times 128 MiB; what is imported on the way, and the allocator's holes, up to 150.
    told = limited(wide, tmp_path / "merged", 280 * MIB, base=base, check=False)
    assert told["n_bytes"] > 384 * MIB and told["spilled_bytes"] == 0
    # Two of the largest tensors; most of it is libraries that are imported on the way.
    assert told["ram_bytes"] < 2 * 128 * MIB
    assert damage(tmp_path / "merged") == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_the_check_holds_one_linear_at_a_time(wide: Path, tmp_path: Path) -> None:
    told = limited(wide, tmp_path / "merged", 0, base="original")
    assert told["check"]["n_same"] == told["check"]["n_tokens"]
    # One weight in fp32, and what the module before it may still hold.
    assert told["ram_bytes"] < 350 * MIB


def test_what_does_not_fit_lies_in_temporary_location(wide: Path, tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    little = limited(
        wide, tmp_path / "little", 0, base="nf4", check=False, maximum_memory_usage=1e-4, temporary_location=str(spill)
    )
    # 0.5625 bytes an element of the largest weight.
    assert little["spilled_bytes"] == 32768 * 1024 * 9 // 16
    assert not spill.exists()
    much = limited(wide, tmp_path / "much", 0, base="nf4", check=False)
    assert much["spilled_bytes"] == 0
    files = [f.name for f in (tmp_path / "much").glob("*.safetensors")]
    assert files and all((tmp_path / d / f).read_bytes() == (tmp_path / "much" / f).read_bytes()
                         for f in files for d in ("little",))  # fmt: skip


def test_a_spill_that_finds_no_disk(wide: Path, tmp_path: Path, small_disk: Any) -> None:
    disk = small_disk(4 * MIB)
    from nbqlora.run.merging import MergeSettings, merge
    from nbqlora.run.sources import MergeSource

    source = MergeSource(folder=wide / "base", adapters=(wide / "adapter",), dtype="fp32")
    settings = MergeSettings(base="nf4", maximum_memory_usage=1e-4, temporary_location=str(disk), check=False)
    with pytest.raises(OutOfDiskError, match="fit neither the memory that saving may use nor"):
        merge(source, tmp_path / "merged", settings)
    assert list(disk.iterdir()) == [] and not (tmp_path / "merged").exists()


def test_a_base_that_was_cut_is_found_before_anything_is_written(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_lora(base, tmp_path / "adapter")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="it was cut, or copied badly"):
        merge_tiny(base, [adapter], tmp_path / "merged")
    assert not work_folder(tmp_path / "merged").exists()


def test_a_full_disk_in_the_middle_goes_on_after_its_whole_shards(tmp_path: Path, small_disk: Any) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_lora(base, tmp_path / "adapter")

    disk = small_disk(1 * MIB)
    (disk / "other").write_bytes(b"x" * (MIB // 2))
    # The room was there when it was looked at, and went to somebody else: the check's reserve is more than this disk.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nbqlora.hub.merge.ROOM_BYTES", -(1 << 40))
        with pytest.raises(
            OutOfDiskError, match=r"merged cannot be written: No space left on device; what is whole of it stays"
        ):
            merge_tiny(base, [adapter], disk / "merged", max_shard_size="100KB", check=False)
        assert not (disk / "merged").exists()
        kept = [f.name for f in work_folder(disk / "merged").glob("model-*")]
        assert kept
        (disk / "other").unlink()
        report = merge_tiny(base, [adapter], disk / "merged", max_shard_size="100KB", check=False)
    assert 0 < report.kept_bytes < report.n_bytes
    whole = merge_tiny(base, [adapter], tmp_path / "whole")
    assert torch.equal(plain_logits(report.path, IDS), plain_logits(whole.path, IDS))


def test_kills_leave_whole_merges(tmp_path: Path) -> None:
    found = kill_merges.run(tmp_path, kills=20, seed=11)
    assert found["killed"] == 20


@pytest.mark.slow
def test_a_thousand_kills(tmp_path: Path) -> None:
    found = kill_merges.run(tmp_path, kills=1000, seed=1)
    assert found["killed"] == 1000 and found["went on"] > 100
