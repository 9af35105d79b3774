"""Only safetensors and JSON are read: a planted pickle is neither loaded nor opened, whichever way leads to it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_hub_download

import nbqlora
from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ModelError
from nbqlora.core.plan import Plan
from nbqlora.hub.access import cached_copy
from nbqlora.hub.inspect import locate, read_tokenizer
from nbqlora.hub.load import load, load_adapter
from tests import tiny
from tests.hub.hub_server import closed_address, hub_server
from tests.hub.pickles import opened_files, plant

ROWS = tiny.make_rows(4)
UseHub = Callable[[str], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("whole"), num_hidden_layers=2)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def unopened(tmp_path: Path) -> Iterator[Path]:
    """The trace of a planted pickle; in the end no pickle was opened, and there is none."""
    trace = tmp_path / "trace"
    with opened_files() as opened:
        yield trace
    assert pickles(opened) == [] and not trace.exists()


def pickles(opened: list[str]) -> list[str]:
    return [name for name in opened if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_a_planted_pickle_that_is_loaded_would_be_seen(tmp_path: Path) -> None:
    file = plant(tmp_path / "pytorch_model.bin", tmp_path / "trace")
    with opened_files() as opened:
        torch.load(file, weights_only=False)
    assert pickles(opened) == [str(file)] and (tmp_path / "trace").exists()


def settings(model: Path | str, out: Path) -> tuple[FinetuneConfig, Plan]:
    options: dict[str, Any] = {"model": str(model), "data": ROWS, "output_dir": str(out), "max_length": 96, "lora_r": 4}
    return FinetuneConfig(**options), nbqlora.plan(**options)


def config_says(folder: Path, **more: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **more}))


def only_a_pickle(folder: Path, trace: Path) -> str:
    (folder / "model.safetensors").unlink()
    plant(folder / "pytorch_model.bin", trace)
    return (
        r"has its weights only as a pickle \(pytorch_model.bin\), which can hold code and is never opened; choose a "
        r"model in safetensors, or, where you trust its author, convert it once with .*save_pretrained\(\"a folder\"\) "
        'and write model = "a folder"$'
    )


def a_pickle_in_parts(folder: Path, trace: Path) -> str:
    (folder / "model.safetensors").unlink()
    plant(folder / "pytorch_model-00001-of-00001.bin", trace)
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return r"only as a pickle \(pytorch_model.bin.index.json\)"


def a_pickle_in_the_index(folder: Path, trace: Path) -> str:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    plant(folder / "a.bin", trace)
    index = {"metadata": {}, "weight_map": {"a": "part.safetensors", "b": "a.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model.safetensors.index.json lists a.bin, which is no safetensors file and is never opened"


def a_pickle_in_the_config(folder: Path, trace: Path) -> str:
    plant(folder / "adapter_model.bin", trace)
    config_says(folder, transformers_weights="adapter_model.bin")
    return "its config.json asks for adapter_model.bin, which is a pickle and is never opened"


def an_adapter_beside_the_model(folder: Path, trace: Path) -> str:
    plant(folder / "adapter_model.bin", trace)
    lora = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "target_modules": ["q_proj"], "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    return r"has an adapter beside the model whose weights are a pickle \(adapter_model.bin\), which is never opened"


SPOILED = [only_a_pickle, a_pickle_in_parts, a_pickle_in_the_index, a_pickle_in_the_config, an_adapter_beside_the_model]


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_folder_that_leads_to_a_pickle_is_refused_before_anything_is_planned(
    folder: Path, tmp_path: Path, unopened: Path, spoil: Callable[[Path, Path], str]
) -> None:
    said = spoil(folder, unopened)
    with pytest.raises(ModelError, match=said):
        settings(folder, tmp_path / "out")


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_folder_that_was_spoiled_since_is_not_loaded(
    folder: Path, tmp_path: Path, unopened: Path, spoil: Callable[[Path, Path], str]
) -> None:
    config, plan = settings(folder, tmp_path / "out")
    tokenizer = read_tokenizer(str(folder))
    said = spoil(folder, unopened)
    with pytest.raises(ModelError, match=said):
        load(config, plan, str(folder), tokenizer)


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_model_of_the_hub_that_leads_to_a_pickle_is_refused_and_not_downloaded(
    folder: Path, use_hub: UseHub, unopened: Path, spoil: Callable[[Path, Path], str]
) -> None:
    said = spoil(folder, unopened)
    with hub_server(folder) as address:
        use_hub(address)
        with pytest.raises(ModelError, match="^org/tiny:? .*" + said.removeprefix("^")):
            locate("org/tiny")
    cached = [p.name for p in Path(constants.HF_HUB_CACHE).rglob("*") if p.is_symlink() or p.is_file()]
    assert "config.json" in cached and not any(name.endswith((".bin", "part.safetensors")) for name in cached)


def test_a_copy_in_the_cache_with_nothing_but_a_pickle_is_no_copy(
    folder: Path, use_hub: UseHub, unopened: Path
) -> None:
    only_a_pickle(folder, unopened)
    with hub_server(folder) as address:
        use_hub(address)
        for name in ("config.json", "pytorch_model.bin"):
            hf_hub_download("org/tiny", name)
        assert cached_copy("org/tiny") is None
    use_hub(closed_address())
    with pytest.raises(ModelError, match=r"^org/tiny is not in the cache, and http.* cannot be reached"):
        locate("org/tiny")


def test_pickles_beside_the_weights_are_passed_over(folder: Path, tmp_path: Path, unopened: Path) -> None:
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth", "state.pkl"):
        plant(folder / name, unopened)
    config, plan = settings(folder, tmp_path / "out")
    assert load(config, plan, str(folder), read_tokenizer(str(folder))).trainable()


def test_a_whole_model_of_the_hub_loads(whole: Path, tmp_path: Path, hub: str, unopened: Path) -> None:
    config, plan = settings(whole, tmp_path / "out")
    assert locate("org/tiny") == "org/tiny"
    assert load(config, plan, "org/tiny", tiny.make_tokenizer()).trainable()


def adapter_of(folder: Path, base: Path, **changes: Any) -> Path:
    from transformers import AutoModelForCausalLM

    tiny.with_lora(AutoModelForCausalLM.from_pretrained(base), **changes).save_pretrained(folder)
    return folder


def test_an_adapter_with_nothing_but_a_pickle_is_refused(whole: Path, tmp_path: Path, unopened: Path) -> None:
    config, plan = settings(whole, tmp_path / "out")
    adapter = adapter_of(tmp_path / "adapter", whole)
    (adapter / "adapter_model.safetensors").unlink()
    plant(adapter / "adapter_model.bin", unopened)
    said = (
        f"the adapter in {adapter} cannot be used: adapter_model.safetensors is missing, and adapter_model.bin is a "
        "pickle, which is never opened; copy it again from where it is whole, or train again"
    )
    with pytest.raises(ModelError, match=f"^{re.escape(said)}$"):
        load_adapter(config, plan, str(whole), read_tokenizer(str(whole)), adapter)


def test_an_adapter_that_peft_made_loads_past_a_planted_pickle(whole: Path, tmp_path: Path, unopened: Path) -> None:
    config, plan = settings(whole, tmp_path / "out")
    adapter = adapter_of(tmp_path / "adapter", whole)
    plant(adapter / "adapter_model.bin", unopened)
    loaded = load_adapter(config, plan, str(whole), read_tokenizer(str(whole)), adapter)
    assert any(p.abs().sum() > 0 for name, p in loaded.model.named_parameters() if "lora_B" in name)


def test_an_adapter_for_other_modules_is_refused_and_not_left_out(whole: Path, tmp_path: Path) -> None:
    config, plan = settings(whole, tmp_path / "out")
    adapter = adapter_of(tmp_path / "adapter", whole)
    few = adapter_of(tmp_path / "few", whole, target_modules=["q_proj"])
    shutil.copy(few / "adapter_model.safetensors", adapter)
    with pytest.raises(ModelError, match=r"is not for this model: it has no base_model\.model\.model\.layers\.0\.mlp"):
        load_adapter(config, plan, str(whole), read_tokenizer(str(whole)), adapter)


def test_a_base_that_was_cut_is_an_error_that_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    config, plan = settings(folder, tmp_path / "out")
    tokenizer = read_tokenizer(str(folder))
    os.truncate(folder / "model.safetensors", os.path.getsize(folder / "model.safetensors") // 2)
    with pytest.raises(ModelError, match=rf"^a file of {folder} is damaged \(.+\); copy {folder} again$"):
        load(config, plan, str(folder), tokenizer)


def test_a_cut_copy_in_the_cache_is_named_by_the_cache(whole: Path, tmp_path: Path, hub: str) -> None:
    config, plan = settings(whole, tmp_path / "out")
    snapshot = Path(hf_hub_download("org/tiny", "model.safetensors"))
    os.truncate(snapshot.resolve(), 1000)
    with pytest.raises(ModelError, match=r"damaged .*; remove its copy from the hub's cache, .*, and it is downloaded"):
        load(config, plan, "org/tiny", tiny.make_tokenizer())
