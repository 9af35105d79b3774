"""llama.cpp's token ids are transformers', text by text; where they cannot be, exactly those texts are named here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nbqlora.hub.gguf import ExportedGguf, export_gguf, splits
from nbqlora.hub.gguf.splits import SPLITS
from tests.data.small_tokenizers import CHATML_MARKED
from tests.hub.gguf.llama_cpp import CLIENTS, ask
from tests.hub.gguf.stream import FolderStream
from tests.hub.gguf.tiny_tokenizers import TEXTS, byte_level, model_with, pieces

# A chat whose pieces begin with a letter, and one whose pieces begin with a space.
LETTERS = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{{ eos_token }}{% endfor %}"
SPACES = "{% for m in messages %}<|im_start|> {{ m['content'] }}<|im_end|>{% endfor %}"
WITHOUT_BOS = SPACES.replace("|> {{", "|>{{")
CHAT = [
    {"role": "user", "content": "Hello world"},
    {"role": "assistant", "content": "two spaces, then 12"},
    {"role": "user", "content": "x"},
]
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos": True}

CASES: Mapping[str, Callable[[Path], Path]] = {
    **{
        name: lambda folder, expressions=expressions, ignores=ignores: byte_level(
            folder, expressions, ignore_merges=ignores
        )
        for (expressions, ignores), name in SPLITS.items()
    },
    "bytes with bos": lambda folder: byte_level(folder, (splits.LLAMA_3,), ignore_merges=True, bos=True),
    "bytes with bos, chat without": lambda folder: byte_level(
        folder, (splits.LLAMA_3,), ignore_merges=True, bos=True, template=WITHOUT_BOS
    ),
    "bytes, chat with marks": lambda folder: byte_level(folder, (splits.QWEN_2,), template=CHATML_MARKED),
    "pieces, never a space": lambda folder: pieces(folder, "never"),
    "pieces, a space by a normalizer": lambda folder: pieces(folder, "always", normalizer=True, bos=True),
    "pieces, always a space": lambda folder: pieces(folder, "always"),
    "pieces, a space at first": lambda folder: pieces(folder, "first"),
    "Gemma": lambda folder: pieces(folder, "never", bos=True, tokenizer_class="GemmaTokenizer"),
    "Llama, legacy": lambda folder: pieces(folder, **LLAMA, legacy=True),
    "Llama, legacy, chat of letters": lambda folder: pieces(folder, **LLAMA, legacy=True, template=LETTERS),
    "Llama, legacy, chat of spaces": lambda folder: pieces(folder, **LLAMA, legacy=True, template=SPACES),
    "Llama, chat": lambda folder: pieces(folder, **LLAMA, legacy=False, template=LETTERS),
}
SPACED = {text for text in TEXTS if text.startswith(" ")} | {"a<|im_end|>b <|im_end|> c <|im_end|><|im_end|>"}
AFTER_SPECIAL = {text for text in TEXTS if "<|im_end|>" in text}
MARKS = {text for text in TEXTS if "\u0301" in text or "हि" in text}
DIFFERENT: Mapping[str, set[str]] = {
    "tekken": MARKS,
    "gpt-4o": MARKS,
    "pieces, always a space": SPACED,
    "Llama, legacy": SPACED,
    "Llama, legacy, chat of letters": SPACED,
    "pieces, a space at first": SPACED | AFTER_SPECIAL,
}
# Said, and different in texts that are no chat: no space, or no bos.
LIKE_A_CHAT = {"Llama, chat", "Llama, legacy, chat of spaces", "bytes with bos, chat without"}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, ExportedGguf]]:
    folder = tmp_path_factory.mktemp("tokens")
    made = {}
    for i, (name, make) in enumerate(CASES.items()):
        model = model_with(make(folder / f"{i}"))
        made[name] = (model, export_gguf(FolderStream(model, rows=100), folder / f"{i}.gguf", "Q8_0"))
    return made


@pytest.fixture(scope="module")
def answers(exports: Mapping[str, tuple[Path, ExportedGguf]]) -> Mapping[str, Mapping[str, Any]]:
    requests = [{"file": done.path, "texts": TEXTS} for _, done in exports.values()]
    return {client: dict(zip(exports, ask(requests, client), strict=True)) for client in CLIENTS}


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(
    name: str, exports: Mapping[str, tuple[Path, ExportedGguf]], answers: Mapping[str, Mapping[str, Any]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exports[name][0])
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    for client in CLIENTS:
        assert answers[client][name].get("error", "") == ""
        found = answers[client][name]["ids"]
        different = {text for text, ids, wanted in zip(TEXTS, found, expected, strict=True) if ids != wanted}
        if name in LIKE_A_CHAT:
            assert "Hello world" in different
        else:
            assert different == DIFFERENT.get(name, set()), client
    assert bool(exports[name][1].notes) == (name in DIFFERENT or name in LIKE_A_CHAT)


@pytest.mark.parametrize("name", [name for name in CASES if "chat" in name])
def test_a_chat_has_the_ids_of_transformers(name: str, exports: Mapping[str, tuple[Path, ExportedGguf]]) -> None:
    folder, done = exports[name]
    (answer,) = ask([{"file": done.path, "chats": [CHAT]}])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert answer["chats"] == [tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)]


def test_what_is_told_about_spaces(exports: Mapping[str, tuple[Path, ExportedGguf]]) -> None:
    every, none = "llama.cpp puts a space before every piece of text; ", "llama.cpp puts no space before a text; "
    nowhere = "transformers does otherwise nowhere in a chat, but in other texts"
    assert exports["Llama, legacy, chat of letters"][1].notes == (every + nowhere,)
    assert exports["Llama, chat"][1].notes == (none + nowhere,)
    bos = "llama.cpp adds no bos to a text, as in the chat; transformers does outside of a chat"
    assert exports["Llama, legacy, chat of spaces"][1].notes == (bos, none + nowhere)
    assert exports["bytes with bos, chat without"][1].notes == (bos,)


def test_bytes_come_back_as_text(
    exports: Mapping[str, tuple[Path, ExportedGguf]], answers: Mapping[str, Mapping[str, Any]]
) -> None:
    assert answers["xllamacpp"]["Gemma"]["back"] == ["<s>" + text for text in TEXTS]
