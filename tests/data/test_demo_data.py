"""The data set that ships with nbqlora: every row is what its README says."""

import re
from typing import Any

import pytest

from nbqlora.core.specs import BatchLayout
from nbqlora.data.encode import encode
from nbqlora.data.rows import read_rows

STYLE = re.compile(r"In short: (?P<short>[^\n]+)\nBecause: (?P<because>[^\n]+)\nTry it: (?P<try>[^\n]+)")
MOST_WORDS = {"short": 14, "because": 18, "try": 14}
# split: rows, of them with two turns
SHAPE = {"train": (128, 8), "eval": (16, 0)}
# split: tokens, supervised tokens and the longest row, with the demo model's tokenizer
TOKENS = {"train": (11_242, 6_106, 149), "eval": (1_359, 730, 93)}


def conversations(split: str) -> list[list[dict[str, str]]]:
    return [row["messages"] for _, row in read_rows("demo", split=split)]


@pytest.mark.parametrize("split", SHAPE)
def test_number_of_rows_and_turns(split: str) -> None:
    rows = conversations(split)
    n_rows, n_long = SHAPE[split]
    assert len(rows) == n_rows
    assert sum(len(messages) == 4 for messages in rows) == n_long
    for messages in rows:
        assert len(messages) in (2, 4)
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(set(m) == {"role", "content"} for m in messages)


@pytest.mark.parametrize("split", SHAPE)
def test_every_answer_has_the_style(split: str) -> None:
    for message in (m for messages in conversations(split) for m in messages):
        content = message["content"]
        assert content == content.strip()
        if message["role"] == "user":
            assert 2 <= len(content.split()) <= 40
            continue
        found = STYLE.fullmatch(content)
        assert found, content
        for part, most in MOST_WORDS.items():
            assert 2 <= len(found.group(part).split()) <= most, content


def test_no_question_is_asked_twice() -> None:
    first = [messages[0]["content"].lower() for split in SHAPE for messages in conversations(split)]
    assert len(set(first)) == len(first)
    answers = [m["content"] for split in SHAPE for c in conversations(split) for m in c if m["role"] == "assistant"]
    assert len(set(answers)) == len(answers)


@pytest.mark.parametrize("split", SHAPE)
def test_rows_are_short_and_all_are_learned_from(split: str, demo_tokenizer: Any) -> None:
    stats = encode(read_rows("demo", split=split), demo_tokenizer, max_length=256, layout=BatchLayout.PADDED).stats
    assert (stats.n_rows, stats.n_truncated, stats.n_skipped) == (SHAPE[split][0], 0, {})
    assert (stats.n_tokens, stats.n_supervised_tokens, stats.max_tokens) == TOKENS[split]
