"""Rows of so many words, and what became of them."""

from typing import Any

from nbqlora.core.specs import BatchLayout
from nbqlora.data.encode import EncodedData, encode
from nbqlora.data.rows import read_rows
from tests.data.small_tokenizers import words

PACKED, JOINED, PADDED = BatchLayout.PACKED, BatchLayout.JOINED, BatchLayout.PADDED


def pair(prompt: int, completion: int, first: int = 0) -> dict[str, str]:
    """A row of ``prompt + completion`` words and the end token."""
    names = [f"w{(first + i) % 50}" for i in range(prompt + completion)]
    return {"prompt": " ".join(names[:prompt]), "completion": " " + " ".join(names[prompt:])}


def encoded(rows: Any, *, max_length: int = 64, layout: BatchLayout = PADDED, **options: Any) -> EncodedData:
    tokenizer = options.pop("tokenizer", None) or words()
    return encode(read_rows(rows), tokenizer, max_length=max_length, layout=layout, **options)


def ids(data: EncodedData) -> list[list[int]]:
    """The rows before packing."""
    return [list(row) for row in data.store.rows["input_ids"]]
