"""The file itself: its bytes, and what is left of an attempt that failed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from safetensors.torch import load_file

from nbqlora.core.errors import ModelError, OutOfDiskError
from nbqlora.hub.atomic import HIDDEN
from nbqlora.hub.gguf import BLOCKS, export_gguf
from tests.hub.gguf.llama_cpp import ask
from tests.hub.gguf.stream import FolderStream
from tests.hub.gguf.tiny_models import save

UP, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), "llama", {})


@pytest.mark.parametrize("quantization", BLOCKS)
def test_every_simple_quantization(quantization: str, folder: Path, tmp_path: Path) -> None:
    said: list[tuple[float, str]] = []
    target = tmp_path / "model.gguf"
    done = export_gguf(FolderStream(folder), target, quantization.lower(), say=lambda *told: said.append(told))
    assert (done.n_bytes, done.sha256) == (target.stat().st_size, hashlib.sha256(target.read_bytes()).hexdigest())
    assert done.quantization == quantization and done.architecture == "llama"
    shares = [share for share, _ in said]
    assert shares == sorted(shares) and shares[-1] == 1.0 and said[0][1] == "writing model.gguf"
    stored = {tensor.name: tensor for tensor in GGUFReader(target).tensors}
    assert len(stored) == done.n_tensors == sum(done.tensor_types.values())
    values = load_file(folder / "model.safetensors")
    # Quantized as a whole, not in pieces of seven rows.
    expected = quants.quantize(values[UP].numpy(), GGMLQuantizationType[quantization])
    np.testing.assert_array_equal(stored["blk.1.ffn_up.weight"].data, expected)
    table = "Q8_0" if quantization[:2] in ("Q4", "Q5") else quantization
    assert stored["token_embd.weight"].tensor_type.name == stored["output.weight"].tensor_type.name == table
    assert all(t.tensor_type.name == "F32" for t in stored.values() if "norm" in t.name)
    assert (done.notes != ()) == (table != quantization)


def test_llama_cpp_computes_with_every_simple_quantization(folder: Path, tmp_path: Path) -> None:
    done = [export_gguf(FolderStream(folder), tmp_path / f"{kind}.gguf", kind) for kind in BLOCKS]
    answers = ask([{"file": file.path, "prompts": [[1, 2, 3]], "n": 3} for file in done])
    # 16 bits keep the most likely token, also of random weights.
    assert all(len(answer["greedy"][0]) == 3 for answer in answers)
    assert len({tuple(answer["greedy"][0]) for answer in answers[:3]}) == 1


def test_pieces_and_runs_make_no_difference(folder: Path, tmp_path: Path) -> None:
    digests = {export_gguf(FolderStream(folder, rows=n), tmp_path / "m.gguf", "F32").sha256 for n in (1, 5, 16, 1000)}
    assert len(digests) == 1


def test_rows_that_no_blocks_fill_are_fp16(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "llama", {"hidden_size": 72, "head_dim": 16})
    done = export_gguf(FolderStream(model), tmp_path / "model.gguf")
    assert done.notes == ("17 matrices are F16, such as output.weight: their rows are no multiple of 32",)
    assert done.tensor_types == {"Q8_0": 6, "F16": 17, "F32": 7}
    (answer,) = ask([{"file": done.path, "prompts": [[1, 2, 3]], "n": 3}])
    assert len(answer["greedy"][0]) == 3


def test_a_name_decides_nothing_about_spaces(folder: Path, tmp_path: Path) -> None:
    # llama.cpp drops spaces after special tokens of a model whose name has "phi-3".
    done = export_gguf(FolderStream(folder), tmp_path / "my-Phi3-and-phi-3.gguf", "F32")
    assert GGUFReader(done.path).fields["general.name"].contents() == "my-phi 3-and-phi 3"
    (answer,) = ask([{"file": done.path, "texts": ["<|im_end|> a"]}])
    assert answer["ids"] == [[259, 220, 64]]


def test_phi_3_drops_spaces_after_special_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.hub.gguf.tiny_tokenizers import model_with, pieces

    made = pieces(tmp_path / "model", "always", normalizer=True)
    raw = json.loads((made / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "content": "<|endoftext|>", "id": len(raw["model"]["vocab"])})
    for token in raw["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    (made / "tokenizer.json").write_text(json.dumps(raw))
    done = export_gguf(FolderStream(model_with(made)), tmp_path / "model.gguf")
    text = "<|im_start|>\n Hello <|im_end|>  world"
    (answer,) = ask([{"file": done.path, "texts": [text]}])
    assert answer["ids"] == [AutoTokenizer.from_pretrained(made)(text)["input_ids"]]
    assert GGUFReader(done.path).fields["general.name"].contents() == "model (phi-3)" and not done.notes


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (float("nan"), f"{UP} has values that are not finite: the model is broken"),
        (1e5, f"{UP} has a value of 1e\\+05, too large for F16; BF16 and Q8_0 can hold it"),
    ],
)
def test_values_that_cannot_be_stored(broken: float, message: str, folder: Path, tmp_path: Path) -> None:
    values = load_file(folder / "model.safetensors")[UP].clone()
    values[100, 3] = broken
    (tmp_path / "model.gguf").write_text("the former one")
    with pytest.raises(ModelError, match=message):
        export_gguf(FolderStream(folder, replaced={UP: values}), tmp_path / "model.gguf", "F16")
    assert [f.read_text() for f in tmp_path.iterdir()] == ["the former one"]


def test_a_stream_that_ends_early(folder: Path, tmp_path: Path) -> None:
    short = load_file(folder / "model.safetensors")[UP][:100]

    class Short(FolderStream):
        def pieces(self, name: str) -> Iterator[torch.Tensor]:
            return iter([short]) if name == UP else super().pieces(name)

    with pytest.raises(ModelError, match=f"{UP} ended after 100 of 128 rows"):
        export_gguf(Short(folder), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_the_former_file(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    first = export_gguf(FolderStream(folder), target)

    def stop(share: float, text: str) -> None:
        if share > 0.5:
            assert len(list(tmp_path.iterdir())) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(FolderStream(folder), target, "F32", say=stop)
    assert list(tmp_path.iterdir()) == [target]
    assert hashlib.sha256(target.read_bytes()).hexdigest() == first.sha256
    assert export_gguf(FolderStream(folder), target, "F32").sha256 != first.sha256


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    (tmp_path / f"{HIDDEN}model.gguf-dead").write_text("half")
    (tmp_path / f"{HIDDEN}other.gguf-dead").write_text("of another file")
    inner: list[int] = []

    def again(share: float, text: str) -> None:
        if share == 1.0 and not inner:
            inner.append(1)
            inner.append(export_gguf(FolderStream(folder), target).n_bytes)

    done = export_gguf(FolderStream(folder), target, "F32", say=again)
    assert inner[1] < done.n_bytes == target.stat().st_size
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"{HIDDEN}other.gguf-dead", "model.gguf"]


def test_wrong_targets_and_names(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a folder; give the name of a file, such as .*model\.gguf"):
        export_gguf(FolderStream(folder), tmp_path)
    with pytest.raises(ModelError, match=r"no such quantization: 'Q9'; there are F32, F16, BF16, Q8_0, .*Q4_K_M"):
        export_gguf(FolderStream(folder), tmp_path / "model.gguf", "Q9")


def test_too_little_room_is_said_before(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(
        OutOfDiskError, match=r"the GGUF file in Q8_0 needs .* has 1 MiB free; choose fewer bits or free"
    ):
        export_gguf(FolderStream(folder), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
