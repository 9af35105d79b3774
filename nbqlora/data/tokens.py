"""Text -> token ids and labels; a label stands where the loss counts, and the tokens there are read back.

Tokens are counted from where the text says. A token that holds both a prompt's end and an answer's begin is
split there, as it is when the model is asked: given the prompt, it begins a token of its own. So is a blank
line that becomes other tokens when an answer follows. Tokenizers that put a space before every text cannot do
so (the text would read differently); there the token counts as the answer's. In the end the learned tokens are
decoded: they must read as the text that they should teach.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from nbqlora.data.frames import Span
from nbqlora.data.messages import RowError
from nbqlora.data.render import Rendered

IGNORED = -100
UNREADABLE = "the answer's tokens do not read as its text"
Ids = npt.NDArray[np.int32]
_PARALLEL = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True, kw_only=True, repr=False)
class EncodedRow:
    """``labels[i]`` is ``input_ids[i]`` where the loss counts, else -100; both ``[seq]``, int32."""

    input_ids: Ids
    labels: Ids

    @property
    def n_learned(self) -> int:
        """Tokens that the loss counts."""
        return int(np.count_nonzero(self.labels != IGNORED))

    def __repr__(self) -> str:
        return f"EncodedRow({len(self.input_ids)} tokens, {self.n_learned} learned)"


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """Args: places: for each learned span its first token, its end, and the characters they stand for."""

    ids: Ids
    places: Sequence[tuple[int, int, Span]]


@contextmanager
def quiet_tokenizers() -> Iterator[None]:
    """Within, a call keeps to its own thread, unless the user decided otherwise.

    The library's own threads would make every later fork of the process (data workers, shell commands) print
    a warning; several calls at once use the cores as well.
    """
    given = os.environ.get(_PARALLEL)
    os.environ.setdefault(_PARALLEL, "false")
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(_PARALLEL, None)


def encode_rendered(rows: Sequence[Rendered | RowError], tokenizer: Any) -> list[EncodedRow | RowError]:
    """Tokenize rows; what cannot be used stays, or becomes, a :class:`RowError`.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """
    given = [row for row in rows if isinstance(row, Rendered)]
    encodings = _encodings([row.text for row in given], tokenizer)
    tokens = [_place(encoding, row) for encoding, row in zip(encodings, given, strict=True)]
    looks_on = _looks_beyond_blank_lines(tokenizer) if given else False
    cuts = {i: found for i, t in enumerate(tokens) if (found := _cuts(t, given[i], looks_on))}
    for i, parts in zip(cuts, _split([(given[i], at) for i, at in cuts.items()], tokenizer), strict=True):
        if _decode(parts.ids, tokenizer) == _decode(tokens[i].ids, tokenizer):
            tokens[i] = parts
    done = iter(_encoded(t, row, tokenizer) for t, row in zip(tokens, given, strict=True))
    return [row if isinstance(row, RowError) else next(done) for row in rows]


def _cuts(tokens: _Tokens, row: Rendered, looks_on: bool) -> list[int]:
    """The begins of spans where the text must be tokenized in two."""
    text = row.text
    return [
        a
        for (_, _, (begin, _)), (a, _) in zip(tokens.places, row.learned or (), strict=True)
        if begin < a or (looks_on and text[max(0, a - 2) : a].isspace() and a > 1)
    ]


def _looks_beyond_blank_lines(tokenizer: Any) -> bool:
    """Whether a blank line becomes other tokens when text follows it, as with GPT-2's way to find words."""
    both, blank, after = (list(e.ids) for e in _encodings(["x:\n\nx", "x:\n\n", "x"], tokenizer))
    return both != blank + after


def _encodings(texts: Sequence[str], tokenizer: Any) -> list[Any]:
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "truncation": False, "verbose": False}
    return list(tokenizer(list(texts), add_special_tokens=False, **options).encodings)


def _place(encoding: Any, row: Rendered) -> _Tokens:
    """The tokens of one text, and which of them stand for the learned spans."""
    places = [_between(encoding, begin, end) for begin, end in row.learned or ()]
    return _Tokens(ids=np.array(encoding.ids, dtype=np.int32), places=places)


def _between(encoding: Any, begin: int, end: int) -> tuple[int, int, Span]:
    """Tokens from the one that holds character ``begin`` up to the last one that ends by ``end``."""
    first, last = encoding.char_to_token(begin), encoding.char_to_token(end - 1) if end > begin else None
    if first is None or last is None:
        # Offsets that leave spaces out, or characters that became no token.
        offsets = encoding.offsets
        first = next((i for i, (_, b) in enumerate(offsets) if b > begin), len(offsets))
        last = first
    n_tokens = len(encoding)
    while last < n_tokens and encoding.token_to_chars(last)[1] <= end:
        last += 1
    if first >= last:
        return first, first, (begin, begin)
    return first, last, (encoding.token_to_chars(first)[0], encoding.token_to_chars(last - 1)[1])


def _split(rows: Sequence[tuple[Rendered, list[int]]], tokenizer: Any) -> list[_Tokens]:
    """The same rows, each text tokenized in parts that begin at its cuts."""
    ranges = [list(pairwise([0, *cuts, len(row.text)])) for row, cuts in rows]
    parts = [row.text[a:b] for (row, _), edges in zip(rows, ranges, strict=True) for a, b in edges]
    encodings = iter(_encodings(parts, tokenizer))
    done = []
    for (row, _), edges in zip(rows, ranges, strict=True):
        ids: list[int] = []
        places = []
        for a, b in edges:
            encoding = next(encodings)
            for first, last, (begin, end) in (
                _between(encoding, begin - a, end - a) for begin, end in row.learned or () if a <= begin < b
            ):
                places.append((len(ids) + first, len(ids) + last, (a + begin, a + end)))
            ids += encoding.ids
        done.append(_Tokens(ids=np.array(ids, dtype=np.int32), places=places))
    return done


def _encoded(tokens: _Tokens, row: Rendered, tokenizer: Any) -> EncodedRow | RowError:
    ids = tokens.ids
    if row.learned is None:
        labels = ids.copy()
    else:
        labels = np.full(len(ids), IGNORED, dtype=np.int32)
        for (first, last, (begin, end)), (asked, until) in zip(tokens.places, row.learned, strict=True):
            text = row.text[min(begin, asked) : until]
            if row.text[end:until].strip() or not _reads_as(ids[first:last], text, tokenizer):
                return RowError(UNREADABLE)
            labels[first:last] = ids[first:last]
    # Nothing predicts a row's first token, so it never counts.
    labels[:1] = IGNORED
    return EncodedRow(input_ids=ids, labels=labels)


def _reads_as(ids: Ids, text: str, tokenizer: Any) -> bool:
    """Whether these tokens, decoded, are the text, or what this tokenizer makes of it when it is alone."""
    read = _decode(ids, tokenizer)
    if read == text:
        return True
    alone = np.array(_encodings([text], tokenizer)[0].ids, dtype=np.int32)
    # Tokenizers that put a space before a text take it away again only where they see the text's begin.
    return read.lstrip(" ") == _decode(alone, tokenizer).lstrip(" ")


def _decode(ids: Ids, tokenizer: Any) -> str:
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))
