"""Tokenizers that llama.cpp cannot have, and what is told about those that it has almost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

from nbqlora.core.errors import ModelError
from nbqlora.hub.gguf import ExportedGguf, export_gguf, splits
from tests.data.small_tokenizers import metaspace, words
from tests.hub.gguf.llama_cpp import ask
from tests.hub.gguf.stream import FolderStream
from tests.hub.gguf.tiny_tokenizers import byte_level, model_with, pieces


def test_a_split_without_a_name_is_refused(tmp_path: Path) -> None:
    model = model_with(byte_level(tmp_path, (r"\p{L}+|\P{L}+",)))
    with pytest.raises(ModelError, match="has no name that is known here for how this tokenizer splits") as raised:
        export_gguf(FolderStream(model), tmp_path / "model.gguf")
    assert r"  \p{L}+|\P{L}+" in str(raised.value)
    assert not (tmp_path / "model.gguf").exists()


def test_a_split_that_takes_whole_tokens_first_is_another_one(tmp_path: Path) -> None:
    model = model_with(byte_level(tmp_path, (splits.QWEN_2,), ignore_merges=True))
    with pytest.raises(ModelError, match="taking whole tokens first"):
        export_gguf(FolderStream(model), tmp_path / "model.gguf")


def test_merges_that_were_learned_are_refused(tmp_path: Path) -> None:
    folder = pieces(tmp_path, "always", normalizer=True)
    raw = json.loads((folder / "tokenizer.json").read_text())
    merges, seen = [], set()
    for left, right in raw["model"]["merges"]:
        if left + right not in seen:
            merges.append([left, right])
            seen.add(left + right)
    raw["model"]["merges"] = merges
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"of its \d+ merges, \d+ do not follow from a score for each token"):
        export_gguf(FolderStream(model_with(folder)), tmp_path / "model.gguf")


def test_a_few_irregular_merges_are_told(tmp_path: Path) -> None:
    folder = pieces(tmp_path, "always", normalizer=True)
    raw = json.loads((folder / "tokenizer.json").read_text())
    del raw["model"]["merges"][-1]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    done = export_gguf(FolderStream(model_with(folder)), tmp_path / "model.gguf")
    n_merges = len(raw["model"]["merges"])
    assert done.notes == (f"1 of {n_merges} merges do not follow from scores: some rare texts may become other tokens",)


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path) -> None:
    for made, message in (
        (words(), "the tokenizer's model is WordLevel; GGUF is written here for BPE only"),
        (metaspace(), "has no name that is known here"),
    ):
        folder = tmp_path / made.__class__.__name__ / message[:9]
        made.save_pretrained(folder)
        with pytest.raises(ModelError, match=message):
            export_gguf(FolderStream(model_with(folder)), folder / "model.gguf")


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
WORDS = {"type": "Split", "pattern": {"Regex": " "}, "behavior": "Isolated", "invert": False}
LOWER = {"type": "Lowercase"}


@pytest.mark.parametrize(
    ("of_bytes", "step", "given", "message"),
    [
        (True, "normalizer", LOWER, "does not change a text before it is split"),
        (False, "normalizer", LOWER, "SentencePiece cannot do this step of the tokenizer: {'type': 'Lowercase'}"),
        (False, "pre_tokenizer", METASPACE, "SentencePiece cannot do this step of the tokenizer: .*'split': True"),
        (False, "pre_tokenizer", WORDS, "SentencePiece cannot do this step of the tokenizer: .*'Split'"),
        (False, "normalizer", None, "the tokenizer does not write spaces as ▁"),
    ],
)
def test_steps_that_llama_cpp_has_not(of_bytes: bool, step: str, given: Any, message: str, tmp_path: Path) -> None:
    folder = byte_level(tmp_path, (splits.GPT_2,)) if of_bytes else pieces(tmp_path, "always", normalizer=True)
    with pytest.raises(ModelError, match=message):
        _export_changed(folder, {step: given})


def test_characters_that_are_composed_first(tmp_path: Path) -> None:
    (note,) = _export_changed(byte_level(tmp_path, (splits.GPT_2,)), {"normalizer": {"type": "NFC"}}).notes
    assert note == "llama.cpp does not compose characters (NFC): an accent typed as a sign of its own stays one"


def test_tokens_and_rows_need_not_be_the_same_number(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, (splits.GPT_2,))
    n_tokens = len(AutoTokenizer.from_pretrained(folder))
    more = export_gguf(FolderStream(model_with(folder, rows=n_tokens + 20)), tmp_path / "more.gguf")
    assert not more.notes
    fewer = export_gguf(FolderStream(model_with(folder, rows=n_tokens - 2)), tmp_path / "fewer.gguf")
    assert fewer.notes == ("tokens that the model has no embedding for are left out: separator, 123",)
    for done, rows in ((more, n_tokens + 20), (fewer, n_tokens - 2)):
        assert len(GGUFReader(done.path).fields["tokenizer.ggml.tokens"].contents()) == rows
        (answer,) = ask([{"file": done.path, "texts": ["Hello world"]}])
        assert answer["ids"] == [AutoTokenizer.from_pretrained(folder)("Hello world")["input_ids"]]


def test_what_ends_an_answer(tmp_path: Path) -> None:
    folder = model_with(byte_level(tmp_path, (splits.GPT_2,)))
    # </s> is the tokenizer's, <|im_end|> llama.cpp knows by its text, the others it must be told, and knows one.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4, 3, 1]}))
    done = export_gguf(FolderStream(folder), tmp_path / "model.gguf")
    fields = GGUFReader(done.path).fields
    named = {word: fields[f"tokenizer.ggml.{word}_token_id"].contents() for word in ("bos", "eos", "eot", "unknown")}
    assert named == {"bos": 1, "eos": 2, "eot": 3, "unknown": 0}
    assert done.notes == ("llama.cpp does not end an answer at <s>",)


def test_nothing_ends_a_text(tmp_path: Path) -> None:
    folder = model_with(byte_level(tmp_path, (splits.GPT_2,), eos_token=None))
    stream = FolderStream(folder)
    stream.config = {**stream.config, "eos_token_id": None}
    with pytest.raises(ModelError, match=r"GGUF needs a token that ends a text \(eos\)"):
        export_gguf(stream, tmp_path / "model.gguf")
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"cannot read .*generation_config\.json"):
        export_gguf(FolderStream(folder), tmp_path / "model.gguf")


def test_what_llama_cpp_cannot_put_around_a_text(tmp_path: Path) -> None:
    around = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [3], "tokens": ["<|im_start|>"]}},
    }
    with pytest.raises(
        ModelError, match=r"makes \['<\|im_start\|>', 'a'\] of 'a'; llama\.cpp puts nothing but bos before"
    ):
        _export_changed(byte_level(tmp_path, (splits.GPT_2,)), {"post_processor": around})


def test_tokens_that_take_spaces_along_are_told(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, (splits.GPT_2,))
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"][3] |= {"lstrip": True, "single_word": True}
    done = _export_changed(folder, raw)
    assert done.notes == (
        "<|im_start|> is found inside words too: llama.cpp cannot do otherwise",
        "llama.cpp keeps spaces around <|im_start|>, transformers drops them",
    )


@pytest.mark.parametrize(
    ("template", "adds_bos"),
    [
        ("{{ raise_exception('no questions') }}", True),
        ("{{ messages[0]['content'] }}", False),
        ("{{ bos_token }}{{ messages[0]['content'] }}", True),
        (
            "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}{{ messages[0]['content'] }}",
            False,
        ),
    ],
)
def test_bos_is_put_where_the_chat_has_it(template: str, adds_bos: bool, tmp_path: Path) -> None:
    folder = model_with(byte_level(tmp_path, (splits.GPT_2,), bos=True, template=template))
    done = export_gguf(FolderStream(folder), tmp_path / "model.gguf")
    assert GGUFReader(done.path).fields["tokenizer.ggml.add_bos_token"].contents() is adds_bos
    said = ("llama.cpp adds no bos to a text, as in the chat; transformers does outside of a chat",)
    assert done.notes == (() if adds_bos else said)


def test_further_templates(tmp_path: Path) -> None:
    folder = model_with(byte_level(tmp_path, (splits.GPT_2,)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "one", "tool_use": "two", "rag": "three"}
    tokenizer.save_pretrained(folder)
    fields = GGUFReader(export_gguf(FolderStream(folder), tmp_path / "model.gguf").path).fields
    assert fields["tokenizer.chat_template"].contents() == "one"
    assert fields["tokenizer.chat_template.tool_use"].contents() == "two"
    assert fields["tokenizer.chat_templates"].contents() == ["rag", "tool_use"]


def test_a_tokenizer_without_its_file_is_refused(tmp_path: Path) -> None:
    from nbqlora.hub.gguf.vocabulary import read_vocabulary

    class Slow:
        pass

    with pytest.raises(ModelError, match=r"the tokenizer is a Slow without tokenizer\.json"):
        read_vocabulary(Slow(), None, tmp_path, 10)


def _export_changed(folder: Path, changes: dict[str, Any]) -> ExportedGguf:
    """Export a tokenizer whose file is changed, with a model made for it."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**raw, **changes}))
    return export_gguf(FolderStream(model_with(folder)), folder / "model.gguf")
