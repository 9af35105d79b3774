"""A tokenizer as llama.cpp reads it: tokens, their kinds, merges or scores, and the ids that mean something.

What counts is what transformers does, not what one of its files says: its classes replace parts of ``tokenizer.json``
when they load it. So the tokenizer is loaded, and read from the library that tokenizes.

Where llama.cpp cannot do the same, it is said in :attr:`Vocabulary.notes`, or refused when ids would differ in ordinary
text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbqlora.core.errors import ModelError
from nbqlora.hub.gguf.pieces import adds_space, is_pieces, scores
from nbqlora.hub.gguf.special import Special, chat_text, read_special
from nbqlora.hub.gguf.splits import SPLIT_NOTES, split_name

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# A merge that no text can bring about: llama.cpp wants a list, and the library writes none that is empty.
_NO_MERGE = "[PAD] [PAD]"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the file says about tokens.

    Args:
        model: llama.cpp's kind of tokenizer: ``gpt2`` or ``llama``.
        split: its name for the splitting of a text (``tokenizer.ggml.pre``).
        tokens: one for each row of the embedding.
        kinds: of each token, in llama.cpp's numbers.
        scores: of each token, for ``llama``.
        merges: two tokens with a space between, for ``gpt2``.
        special: ids, what is put around a text, and the chat template.
        space_first: a space is put before a text and after a special token.
        notes: where llama.cpp and transformers part.
    """

    model: str
    split: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    special: Special
    space_first: bool
    notes: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """About what it takes in the file."""
        texts = [*self.tokens, *self.merges]
        return sum(len(text.encode()) + 8 for text in texts) + 8 * len(self.tokens)


def read_vocabulary(tokenizer: Any, config: Any, folder: Path, rows: int) -> Vocabulary:
    """Read a tokenizer for a model whose embedding has ``rows`` rows.

    Args:
        tokenizer: transformers' own.
        config: transformers' config of the model, for ids that the tokenizer does not name.
        folder: the model's, for ``generation_config.json``.

    Raises:
        ModelError: llama.cpp could not tokenize alike.
    """
    raw = _as_loaded(tokenizer)
    _check_model(raw["model"])
    tokens, kinds, notes = _tokens(raw, rows, tokenizer.unk_token if is_pieces(raw) else None)
    merges = [_pair(merge) for merge in raw["model"]["merges"]]
    special, told = read_special(tokenizer, config, folder, tokens, byte_level=not is_pieces(raw))
    notes += told
    if is_pieces(raw):
        space_first, space_notes = _space_first(raw, tokenizer)
        values, irregular = scores(tokens, merges)
        notes += space_notes + _irregular_notes(irregular, len(merges))
        model, split, joined = "llama", "default", []
    else:
        space_first, values, model, split = False, [], "gpt2", split_name(raw)
        joined = [f"{left} {right}" for left, right in merges] or [_NO_MERGE]
        notes += [*_normalizer_notes(raw), *([SPLIT_NOTES[split]] if split in SPLIT_NOTES else [])]
    return Vocabulary(
        model=model,
        split=split,
        tokens=tokens,
        kinds=kinds,
        scores=values,
        merges=joined,
        special=special,
        space_first=space_first,
        notes=tuple(notes),
    )


def _as_loaded(tokenizer: Any) -> dict[str, Any]:
    """What ``tokenizer.json`` would hold of the tokenizer as transformers made it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"the tokenizer is a {type(tokenizer).__name__} without tokenizer.json, which GGUF is written from; "
            "save it with tokenizer.save_pretrained from a class that has one"
        )
    return dict(json.loads(backend.to_str()))


def _check_model(model: Mapping[str, Any]) -> None:
    if model["type"] != "BPE":
        raise ModelError(f"the tokenizer's model is {model['type']}; GGUF is written here for BPE only")
    affixes = {key: model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)}
    if affixes or model.get("dropout"):
        raise ModelError(f"llama.cpp's tokenizer has no {', '.join(affixes) or 'dropout'}, and this tokenizer has")


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _tokens(raw: Mapping[str, Any], rows: int, unknown: str | None) -> tuple[list[str], list[int], list[str]]:
    """Token and kind for each row of the embedding; rows without a token get one that no text has."""
    tokens = {int(i): str(token) for token, i in raw["model"]["vocab"].items()}
    kinds = {i: BYTE if is_pieces(raw) and _BYTE.fullmatch(token) else NORMAL for i, token in tokens.items()}
    notes = []
    for added in raw["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if added["content"] == unknown:
            kinds[added["id"]] = UNKNOWN
        if added["single_word"]:
            notes.append(f"{added['content']} is found inside words too: llama.cpp cannot do otherwise")
    if beyond := sorted(i for i in tokens if i >= rows):
        shown = ", ".join(tokens[i] for i in beyond[:5])
        notes.append(f"tokens that the model has no embedding for are left out: {shown}")
    taken = set(tokens.values())
    for row in range(rows):
        if row not in tokens:
            name = f"[PAD{row}]"
            tokens[row], kinds[row] = name + "_" * (name in taken), UNUSED
    return [tokens[i] for i in range(rows)], [kinds[i] for i in range(rows)], notes


def _space_first(raw: Mapping[str, Any], tokenizer: Any) -> tuple[bool, list[str]]:
    """Whether llama.cpp puts a space before a text and after each special token: all or nothing.

    transformers decides for each piece of text. What is right for most pieces of the model's own chat is taken; without
    a chat, what is right for a plain text.
    """
    scheme = adds_space(raw)
    if scheme == "never" or "Prepend" in json.dumps(raw.get("normalizer")):
        return scheme != "never", []
    wanted = [
        not piece.startswith(" ") and (scheme == "always" or place == 0)
        for place, piece in enumerate(_text_pieces(chat_text(tokenizer) or "Hello", raw))
        if piece
    ]
    space_first = 2 * sum(wanted) >= len(wanted)
    differ = sum(want != space_first for want in wanted)
    where = f"in {differ} of {len(wanted)} pieces of a chat" if differ else "nowhere in a chat, but in other texts"
    does = "a space before every piece of text" if space_first else "no space before a text"
    return space_first, [f"llama.cpp puts {does}; transformers does otherwise {where}"]


def _text_pieces(text: str, raw: Mapping[str, Any]) -> list[str]:
    """What stands between special tokens; the first is "" where one begins the text."""
    special = "|".join(re.escape(token["content"]) for token in raw["added_tokens"])
    return re.split(special, text) if special else [text]


def _irregular_notes(irregular: int, n_merges: int) -> list[str]:
    if not irregular:
        return []
    return [f"{irregular} of {n_merges} merges do not follow from scores: some rare texts may become other tokens"]


def _normalizer_notes(raw: Mapping[str, Any]) -> list[str]:
    match raw.get("normalizer"):
        case None:
            return []
        case {"type": "NFC"} | {"type": "Sequence", "normalizers": [{"type": "NFC"}]}:
            return ["llama.cpp does not compose characters (NFC): an accent typed as a sign of its own stays one"]
        case {"type": "Sequence", "normalizers": []}:
            return []
        case other:
            raise ModelError(f"llama.cpp does not change a text before it is split, and this tokenizer does: {other}")
