"""A real model, its real tokenizer and real answers: the demo model back to GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbqlora.hub.demo_model import demo_model
from nbqlora.hub.gguf import ExportedGguf, export_gguf
from tests.hub.gguf.llama_cpp import ask
from tests.hub.gguf.stream import FolderStream
from tests.hub.gguf.tiny_tokenizers import TEXTS

pytestmark = pytest.mark.slow

QUANTIZATIONS = ("F32", "F16", "Q8_0", "Q4_K_M")
QUESTIONS = ("What is the capital of France?", "Count from one to five.", "Write one sentence about the sea.")
CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]
BEGUN = ("The capital of France is", "1, 2, 3, 4,")
N_TOKENS = 12


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo_model()


@pytest.fixture(scope="module")
def exports(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ExportedGguf]:
    target = tmp_path_factory.mktemp("demo")
    return {kind: export_gguf(FolderStream(folder, rows=999), target / f"{kind}.gguf", kind) for kind in QUANTIZATIONS}


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in CHATS]
    return [*chats, *(tokenizer(text)["input_ids"] for text in BEGUN)]


@pytest.fixture(scope="module")
def answers(exports: Mapping[str, ExportedGguf], prompts: list[list[int]]) -> Mapping[str, Mapping[str, Any]]:
    given = {"prompts": prompts, "n": N_TOKENS, "texts": TEXTS, "chats": CHATS, "context": 256}
    return dict(zip(exports, ask([{"file": done.path, **given} for done in exports.values()]), strict=True))


def test_greedy_answers_are_those_of_transformers(
    folder: Path, answers: Mapping[str, Mapping[str, Any]], prompts: list[list[int]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end = model.config.eos_token_id
    for i, prompt in enumerate(prompts):
        given = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        ids = model.generate(**given, max_new_tokens=N_TOKENS, do_sample=False)[0, len(prompt) :].tolist()
        # llama.cpp goes on where transformers ends.
        wanted = list(takewhile(lambda token: token != end, ids))
        assert len(wanted) >= 5
        for kind in ("F32", "F16"):
            assert answers[kind]["greedy"][i][: len(wanted)] == wanted, (kind, i)


def test_texts_and_chats_are_tokenized_as_by_transformers(
    folder: Path, answers: Mapping[str, Mapping[str, Any]], prompts: list[list[int]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for answer in answers.values():
        assert answer["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
        assert answer["chats"] == prompts[: len(CHATS)]


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_K_M"])
def test_quantized_it_still_makes_sense(
    quantization: str, folder: Path, answers: Mapping[str, Mapping[str, Any]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode(ids) for ids in answers[quantization]["greedy"]]
    assert texts[-2].startswith(" Paris")
    assert texts[-1].startswith(" 5, 6, 7")


def test_sizes_and_types(exports: Mapping[str, ExportedGguf]) -> None:
    assert exports["Q8_0"].tensor_types == {"Q8_0": 211, "F32": 61} and exports["Q8_0"].notes == ()
    assert exports["Q8_0"].n_bytes < 0.55 * exports["F16"].n_bytes < 0.3 * exports["F32"].n_bytes
    # Rows of 576 are no multiple of 256; those of 1536 are.
    assert exports["Q4_K_M"].tensor_types["Q4_K"] == 16
    (note,) = exports["Q4_K_M"].notes
    assert note.startswith("181 matrices, such as ") and exports["Q4_K_M"].n_bytes < exports["Q8_0"].n_bytes
