"""K-quants by llama.cpp's own quantizer: what is made, what is left, and what is said when it cannot be."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from nbqlora.core.errors import ModelError, OutOfDiskError
from nbqlora.hub.gguf import K_QUANTS, ExportedGguf, export_gguf, kquants
from nbqlora.hub.gguf.contents import read_contents
from tests.hub.gguf.llama_cpp import ask
from tests.hub.gguf.stream import FolderStream
from tests.hub.gguf.tiny_models import save

Said = list[tuple[float, str]]
# Rows of 256, which a K-quant's block is.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), "llama", WIDE)


@pytest.fixture(scope="module")
def exports(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[ExportedGguf, Said]]:
    target = tmp_path_factory.mktemp("exports")
    made = {}
    for kind in K_QUANTS:
        said: Said = []
        done = export_gguf(
            FolderStream(folder), target / f"{kind}.gguf", kind, say=lambda *told, s=said: s.append(told)
        )
        made[kind] = (done, said)
    assert sorted(f.name for f in target.iterdir()) == sorted(f"{kind}.gguf" for kind in K_QUANTS)
    return made


@pytest.mark.parametrize("quantization", K_QUANTS)
def test_every_k_quant(quantization: str, folder: Path, exports: Mapping[str, tuple[ExportedGguf, Said]]) -> None:
    done, said = exports[quantization]
    data = Path(done.path).read_bytes()
    assert (done.n_bytes, done.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert done.tensor_types["F32"] == 3 and sum(done.tensor_types.values()) == done.n_tensors == 12
    assert any("K" in kind or "IQ" in kind for kind in done.tensor_types) and not done.notes
    shares = [share for share, _ in said]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert said[0][1] == "writing BF16 to quantize from"
    assert said[-1][1] == f"quantizing {quantization}.gguf to {quantization}"
    # What was expected on the disk is what it became, or a little more.
    expected = kquants.expected_bytes(read_contents(FolderStream(folder), "BF16", "").tensors, quantization)
    tensors = sum(int(tensor.n_bytes) for tensor in GGUFReader(done.path).tensors)
    assert tensors <= expected <= 1.35 * tensors


def test_llama_cpp_computes_with_every_k_quant(exports: Mapping[str, tuple[ExportedGguf, Said]]) -> None:
    answers = ask([{"file": done.path, "prompts": [[1, 2, 3]], "n": 3} for done, _ in exports.values()])
    assert all(len(answer["greedy"][0]) == 3 for answer in answers)


def test_rows_that_no_blocks_fill(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "llama", {})
    done = export_gguf(FolderStream(model), tmp_path / "model.gguf", "Q4_K_M")
    assert done.notes == (
        "23 matrices, such as output.weight, have rows that are no multiple of 256: llama.cpp stores them in other "
        "types, with more bits",
    )
    assert not any("K" in kind for kind in done.tensor_types)
    (answer,) = ask([{"file": done.path, "prompts": [[1, 2, 3]], "n": 3}])
    assert len(answer["greedy"][0]) == 3


def test_the_file_in_between_is_put_elsewhere_and_goes(folder: Path, tmp_path: Path) -> None:
    seen: set[str] = set()

    def look(share: float, text: str) -> None:
        seen.update(f"{f.parent.name}/{f.name[:19]}" for f in tmp_path.glob("*/.*"))

    done = export_gguf(
        FolderStream(folder), tmp_path / "out" / "m.gguf", "Q4_K_M", temporary_location=tmp_path / "other", say=look
    )
    assert {name.split("/")[0] for name in seen} == {"out", "other"}
    assert [str(f) for f in tmp_path.rglob("*") if f.is_file()] == [done.path]


def test_a_base_in_fp16_stays_so_in_between(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save(tmp_path / "model", "llama", WIDE)
    AutoModelForCausalLM.from_pretrained(folder).half().save_pretrained(folder)
    said: list[str] = []
    export_gguf(FolderStream(folder), tmp_path / "m.gguf", "Q6_K", say=lambda share, text: said.append(text))
    assert said[0] == "writing F16 to quantize from"


def test_without_the_quantizer_nothing_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError) as raised:
        export_gguf(FolderStream(folder), tmp_path / "out" / "model.gguf", "q4_k_m")
    assert str(raised.value).splitlines() == [
        'K-quants are made by llama.cpp\'s quantizer, which is not installed: pip install "nbqlora[gguf]"',
        "  Q8_0, Q5_1, Q5_0, Q4_1 and Q4_0 need nothing more",
    ]
    assert not list(tmp_path.iterdir())


def test_room_is_looked_for_in_both_places(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=30 << 20))
    target = tmp_path / "model.gguf"
    with pytest.raises(OutOfDiskError, match=r"Q4_K_M, with the 16-bit file that it is made from, needs 0\.03 GiB"):
        export_gguf(FolderStream(folder), target, "Q4_K_M")
    if Path("/dev/shm").is_dir() and Path("/dev/shm").stat().st_dev != tmp_path.stat().st_dev:
        other = Path("/dev/shm") / f"nbqlora-{tmp_path.name}"
        export_gguf(FolderStream(folder), target, "Q4_K_M", temporary_location=other)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=(30 << 20) * (path != other)))
        with pytest.raises(
            OutOfDiskError, match=r"the 16-bit file that Q4_K_M is made from needs .* temporary_location"
        ):
            export_gguf(FolderStream(folder), target, "Q4_K_M", temporary_location=other)
        assert not list(other.iterdir())
        other.rmdir()


def test_what_the_quantizer_says_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUX" * 10)
    (tmp_path / "target").touch()
    with pytest.raises(ModelError, match=r"llama\.cpp's quantizer could not make Q4_K_M \(exit 1\): .+"):
        kquants.quantize(tmp_path / "no.gguf", tmp_path / "target", "Q4_K_M", lambda size: None)


def test_an_interrupt_ends_the_quantizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Wide enough that the quantizer is at work for a while.
    folder = save(tmp_path / "model", "llama", {**WIDE, "hidden_size": 2048, "vocab_size": 8000})
    started: list[Any] = []
    monkeypatch.setattr(kquants, "_LOOK_SECONDS", 0.02)
    popen = subprocess.Popen

    def starting(*args: Any, **settings: Any) -> Any:
        started.append(popen(*args, **settings))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", starting)

    def stop(share: float, text: str) -> None:
        if text.startswith("quantizing"):
            raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        export_gguf(FolderStream(folder, rows=999), tmp_path / "m.gguf", "IQ4_XS", say=stop)
    assert started[0].returncode == -9 and time.monotonic() - begun < 20
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
