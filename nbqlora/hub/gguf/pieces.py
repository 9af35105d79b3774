"""Tokenizers that join characters and fall back to bytes (Llama 2, Mistral, Gemma), as llama.cpp's SentencePiece.

transformers joins the pair that stands first in a list of merges; llama.cpp joins the pair whose joined token has the
highest score, the leftmost first. Both do the same when the list was made from scores, as it was for every model that
came from SentencePiece: then a token's score is the place of its first merge, counted down. ``tokenizer.model`` is not
asked: the list is what transformers tokenized the training data with, and a saved tokenizer has no other file.

A list that was learned instead, with one merge a token, lets llama.cpp join pairs that transformers would not. How far
a list is from one made from scores is counted, and told or refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nbqlora.core.errors import ModelError

SPACE = "▁"
# One merge in so many may be irregular; a list that was learned has far more.
_REGULAR = 100


def is_pieces(raw: Mapping[str, Any]) -> bool:
    """Whether ``tokenizer.json`` falls back to bytes and keeps the text's own characters."""
    return bool(raw["model"].get("byte_fallback"))


def adds_space(raw: Mapping[str, Any]) -> str:
    """When a space is put before a text: ``always`` (and after every special token), ``first`` or ``never``.

    Raises:
        ModelError: spaces or other characters are treated in a way that llama.cpp's SentencePiece has not.
    """
    escapes, scheme = False, "never"
    for step in [*_steps(raw.get("normalizer"), "normalizers"), *_steps(raw.get("pre_tokenizer"), "pretokenizers")]:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                scheme = "always"
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                escapes = True
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": given, "split": False}:
                escapes, scheme = True, str(given)
            case {"type": "Split", "pattern": {"String": " "}} if escapes:
                pass  # No space is left to split at.
            case _:
                raise ModelError(f"llama.cpp's SentencePiece cannot do this step of the tokenizer: {dict(step)}")
    if not escapes:
        raise ModelError(f"the tokenizer does not write spaces as {SPACE}, and llama.cpp's SentencePiece does")
    return scheme


def scores(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> tuple[list[float], int]:
    """A score for every token, and how many merges llama.cpp would take in another order or not know.

    Raises:
        ModelError: the list of merges was not made from scores.
    """
    first: dict[str, int] = {}
    irregular, latest = 0, 0
    for place, (left, right) in enumerate(merges):
        rank = first.setdefault(left + right, place)
        irregular += rank < latest
        latest = max(latest, rank)
    irregular += _unlisted_pairs(tokens, first, merges)
    if irregular * _REGULAR > len(merges):
        raise ModelError(
            f"llama.cpp's SentencePiece would join other tokens than this tokenizer: of its {len(merges)} merges, "
            f"{irregular} do not follow from a score for each token"
        )
    # A token that nothing joins to has the lowest score; it is found as a character or as a special token.
    lowest = -float(len(merges) + 1)
    return [-float(first[token]) if token in first else lowest for token in tokens], irregular


def _unlisted_pairs(tokens: Sequence[str], first: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> int:
    """Pairs that can come about and would join to a token, although no merge says so."""
    listed = set(merges)
    return sum(
        1
        for token in tokens
        for cut in range(1, len(token))
        if _reached(token[:cut], first) and _reached(token[cut:], first) and (token[:cut], token[cut:]) not in listed
    )


def _reached(piece: str, first: Mapping[str, int]) -> bool:
    return len(piece) == 1 or piece in first


def _steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return [inner for s in step[key] for inner in _steps(s, key)] if step["type"] == "Sequence" else [step]
