"""A merged model: equal to what PEFT says of base and adapter, whole or not there, made within little memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nbqlora.core.errors import ConfigError, ModelError, OutOfDiskError, RunError
from nbqlora.hub.merge import parse_size, work_folder
from nbqlora.hub.merge_journal import MANIFEST, damage
from nbqlora.hub.stored import open_model
from nbqlora.run.merging import MergeSettings
from nbqlora.view.merged import merge_text
from tests import tiny
from tests.hub.merging import CASES, merge_tiny, peft_logits, plain_logits, save_as_seen, save_base, save_lora

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in five files, and an adapter."""
    folder = tmp_path_factory.mktemp("llama")
    base = save_base(folder / "base", "llama", shards="200KB")
    assert len(list(base.glob("*.safetensors"))) >= 4
    return base, save_lora(base, folder / "adapter")


@pytest.mark.parametrize("case", CASES)
def test_equals_base_and_adapter(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    base = save_base(tmp_path / "base", family)
    adapter = save_lora(base, tmp_path / "adapter", **changes)
    report = merge_tiny(base, [adapter], tmp_path / "merged")
    expected = peft_logits(base, [adapter], IDS)
    assert torch.allclose(plain_logits(report.path, IDS), expected, rtol=1e-4, atol=1e-4)
    # The adapter matters: without it the logits are others.
    assert not torch.allclose(plain_logits(base, IDS), expected, rtol=1e-2, atol=1e-2)
    assert report.check.relative < 1e-3 and report.check.n_same == report.check.n_tokens
    assert damage(Path(report.path)) == ""


def test_the_check_sees_one_layer_that_was_left_out(llama, tmp_path):
    """What it is for: the same comparison, with files in which one module of 21 has no adapter."""
    base, adapter = llama
    from safetensors.torch import load_file, save_file

    from nbqlora.hub.merge_journal import MANIFEST
    from nbqlora.hub.stored import SINGLE

    report = merge_tiny(base, [adapter], tmp_path / "merged")
    assert report.check.agrees
    merged, plain = tmp_path / "merged" / SINGLE, {}
    for file in base.glob("*.safetensors"):
        plain |= load_file(file)
    tensors, name = load_file(merged), "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(tensors[name], plain[name])
    save_file({**tensors, name: plain[name]}, merged, metadata={"format": "pt"})
    manifest = json.loads((tmp_path / "merged" / MANIFEST).read_text())
    from nbqlora.hub.save import sha256

    manifest["files"][SINGLE] = [merged.stat().st_size, sha256(merged)]
    (tmp_path / "merged" / MANIFEST).write_text(json.dumps(manifest))
    again = merge_tiny(base, [adapter], tmp_path / "merged")
    assert again.kept_bytes == again.n_bytes  # it takes the files for whole, and compares
    assert not again.check.agrees and again.check.relative > 3 * report.check.relative
    assert "CHECK" in merge_text(again) and "do not use it" in merge_text(again)


def test_several_adapters_are_added(llama, tmp_path):
    base, adapter = llama
    other = save_lora(base, tmp_path / "other", seed=5, target_modules=["q_proj", "up_proj"])
    report = merge_tiny(base, [adapter, other], tmp_path / "merged")
    expected = peft_logits(base, [adapter, other], IDS)
    assert torch.allclose(plain_logits(report.path, IDS), expected, rtol=1e-4, atol=1e-4)
    assert report.check.relative < 1e-3


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_into_what_training_saw(loaded: bool, family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    adapter = save_lora(base, tmp_path / "adapter")
    model = tiny.load_nf4(base) if loaded else None
    report = merge_tiny(base, [adapter], tmp_path / "merged", base="nf4", model=model)
    expected = peft_logits(save_as_seen(base, tmp_path / "seen"), [adapter], IDS)
    assert torch.allclose(plain_logits(report.path, IDS), expected, rtol=1e-4, atol=1e-4)
    # Into the published weights it is another model.
    original = merge_tiny(base, [adapter], tmp_path / "original")
    assert not torch.allclose(plain_logits(original.path, IDS), expected, rtol=1e-2, atol=1e-2)


def test_a_checkpoint_that_is_stored_in_4_bits(llama, tmp_path):
    base, adapter = llama
    quantized = tmp_path / "quantized"
    tiny.load_nf4(base).save_pretrained(quantized)
    tiny.make_tokenizer().save_pretrained(quantized)
    report = merge_tiny(quantized, [adapter], tmp_path / "merged", base="nf4")
    assert "quantization_config" not in json.loads((Path(report.path) / "config.json").read_text())
    again = merge_tiny(base, [adapter], tmp_path / "again", base="nf4")
    assert torch.equal(plain_logits(report.path, IDS), plain_logits(again.path, IDS))
    with pytest.raises(ModelError, match='stored in 4 bits, so there are no original weights; write base="nf4"'):
        merge_tiny(quantized, [adapter], tmp_path / "other")


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", dtype=torch.bfloat16)
    adapter = save_lora(base, tmp_path / "adapter")
    report = merge_tiny(base, [adapter], tmp_path / "merged", dtype=dtype)
    wanted = torch.float16 if dtype == "fp16" else torch.bfloat16
    assert {each.dtype for each in open_model(Path(report.path)).values()} == {wanted}
    config = json.loads((Path(report.path) / "config.json").read_text())
    assert config["dtype"] == str(wanted).removeprefix("torch.")
    assert report.check.agrees and 0 < report.check.relative < 0.1


def test_files_are_the_bases_and_whole(llama, tmp_path):
    base, adapter = llama
    report = merge_tiny(base, [adapter], tmp_path / "merged", max_shard_size="150KB")
    folder = Path(report.path)
    names = sorted(p.name for p in folder.iterdir())
    assert report.n_files == len([n for n in names if n.endswith(".safetensors")]) >= 4
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", MANIFEST} <= {*names}
    assert all(f.stat().st_size <= 160_000 for f in folder.glob("*.safetensors"))
    assert open_model(folder).keys() == open_model(base).keys()
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_the_tokenizer_is_the_bases_unless_the_adapter_brings_another(llama, tmp_path):
    base, adapter = llama
    tokenizer = tiny.make_tokenizer()
    tokenizer.save_pretrained(adapter)
    (adapter / "tokenizer_config.json").write_text((adapter / "tokenizer_config.json").read_text() + "\n")
    merged = Path(merge_tiny(base, [adapter], tmp_path / "same", check=False).path)
    assert (merged / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    merged = Path(merge_tiny(base, [adapter], tmp_path / "template", check=False).path)
    assert (merged / "chat_template.jinja").read_text() == tokenizer.chat_template


def test_the_same_merge_again_writes_nothing(llama, tmp_path):
    base, adapter = llama
    first = merge_tiny(base, [adapter], tmp_path / "merged")
    times = {p: p.stat().st_mtime_ns for p in Path(first.path).iterdir()}
    again = merge_tiny(base, [adapter], tmp_path / "merged")
    assert again.kept_bytes == again.n_bytes == first.n_bytes
    assert {p: p.stat().st_mtime_ns for p in Path(first.path).iterdir()} == times


def test_another_merge_replaces_it(llama, tmp_path):
    base, adapter = llama
    merge_tiny(base, [adapter], tmp_path / "merged")
    other = save_lora(base, tmp_path / "other", seed=7)
    report = merge_tiny(base, [other], tmp_path / "merged")
    expected = peft_logits(base, [other], IDS)
    assert torch.allclose(plain_logits(report.path, IDS), expected, rtol=1e-4, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "other"]


def test_damage_is_found_and_mended(llama, tmp_path):
    base, adapter = llama
    report = merge_tiny(base, [adapter], tmp_path / "merged", max_shard_size="150KB")
    shard = sorted(Path(report.path).glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert damage(Path(report.path)) == f"{shard.name} is not what was written"
    again = merge_tiny(base, [adapter], tmp_path / "merged", max_shard_size="150KB")
    assert again.kept_bytes < again.n_bytes and damage(Path(report.path)) == ""


def test_never_over_other_files(llama, tmp_path):
    base, adapter = llama
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="holds other files; a merge replaces only an earlier merge"):
        merge_tiny(base, [adapter], tmp_path / "mine")
    with pytest.raises(RunError, match="is a file; name a folder"):
        merge_tiny(base, [adapter], tmp_path / "mine" / "thesis.tex")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_an_adapter_of_another_model(llama, tmp_path):
    base, _ = llama
    other = save_base(tmp_path / "other", "qwen3")
    adapter = save_lora(other, tmp_path / "adapter")
    with pytest.raises(
        ModelError, match=r"the adapter is for \(64, 64\), and .*k_proj.weight of the base is \(32, 64\): another"
    ):
        merge_tiny(base, [adapter], tmp_path / "merged")
    phi = save_lora(save_base(tmp_path / "phi", "phi3"), tmp_path / "phi-adapter")
    with pytest.raises(ModelError, match="which the base's files do not have: another model"):
        merge_tiny(base, [phi], tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not work_folder(tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_bias": True}, "uses lora_bias, which merging does not know; nothing was written"),
        ({"init_lora_weights": "pissa"}, "began as pissa, which changes the base too"),
    ],
)
def test_adapters_that_cannot_be_merged(llama, tmp_path, changes, message):
    base, _ = llama
    adapter = save_lora(base, tmp_path / "adapter", **changes)
    with pytest.raises(ModelError, match=message):
        merge_tiny(base, [adapter], tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_values_that_fp16_does_not_hold(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = save_lora(base, tmp_path / "adapter")
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 70_000.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model.norm.weight has values beyond what fp16 holds \(65504\); write dtype"):
        merge_tiny(base, [adapter], tmp_path / "merged", dtype="fp16")
    assert not (tmp_path / "merged").exists()


def test_settings_are_all_checked_at_once():
    with pytest.raises(ConfigError) as caught:
        MergeSettings(base="int8", dtype="fp8", maximum_memory_usage=0.99, max_shard_size="big")
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 problems in the merge"
    above = "0.99 is above 0.95: the rest of the machine needs memory too; 0.9 is usual, 0.95 the most"
    assert lines[3] == f"  maximum_memory_usage  {above}"
    for wrong in (0, -0.5, "much", True, 0.951):
        with pytest.raises(ConfigError, match="maximum_memory_usage"):
            MergeSettings(maximum_memory_usage=wrong)
    assert MergeSettings(maximum_memory_usage=0.95).maximum_memory_usage == 0.95


@pytest.mark.parametrize(("text", "n"), [("5GB", 5_000_000_000), ("500MiB", 500 << 20), (17, 17), ("1.5 kb", 1500)])
def test_sizes(text, n):
    assert parse_size(text) == n


def test_a_full_disk_keeps_what_is_done(llama, tmp_path, small_disk):
    base, adapter = llama
    whole = merge_tiny(base, [adapter], tmp_path / "whole", max_shard_size="150KB")
    disk = small_disk(1 << 20)
    (disk / "ballast").write_bytes(b"x" * (1 << 19))
    with pytest.raises(OutOfDiskError, match=r"^merged needs .* and .* has .* free; "):
        merge_tiny(base, [adapter], disk / "merged", max_shard_size="150KB")
    assert not (disk / "merged").exists()
    assert whole.n_bytes > 1 << 19


def test_little_memory_spills_and_says_so(llama, tmp_path):
    from nbqlora.memory.allowance import Workspace

    work = Workspace(1000, tmp_path, ".saving-")
    small, large = work.empty(900, torch.uint8), work.empty(300, torch.float32)
    (file,) = tmp_path.glob(".saving-spill-*.safetensors")
    large.copy_(torch.arange(300))
    from safetensors.torch import load_file

    assert torch.equal(load_file(file)["data"], torch.arange(300).float())
    assert work.spilled_bytes == 1200
    work.give_back(small)
    assert work.empty(1000, torch.uint8) is not None and work.spilled_bytes == 1200
    work.give_back(large)
    work.close()
    assert list(tmp_path.iterdir()) == []


def test_a_spill_onto_a_full_disk_is_an_error(small_disk):
    from nbqlora.memory.allowance import Workspace

    disk = small_disk(1 << 20)
    work = Workspace(0, disk, ".saving-")
    with pytest.raises(OutOfDiskError, match="fit neither the memory that saving may use nor"):
        work.empty(8 << 20, torch.uint8)
    assert list(disk.iterdir()) == []
