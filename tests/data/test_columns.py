"""Columns that make no format: what is there, what was expected, and the nearest guess."""

from typing import Any

import pytest

from nbqlora.core.errors import DataError
from nbqlora.data.formats import Format, detect_format
from nbqlora.data.messages import RowError
from nbqlora.data.rows import ACCEPTED

NAN = float("nan")
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TALK = [USER, ANSWER]
TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def detected(*rows: dict[str, Any]) -> Format:
    return detect_format(rows, "rows.jsonl")


def said(*rows: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        detected(*rows)
    return str(caught.value)


WRONG_COLUMNS: list[tuple[dict[str, Any], str]] = [
    ({"question": "a", "answer": "b"},
     "the columns question, answer; rename question to prompt and answer to completion"),
    ({"id": 1, "Question": "a", "Response": "b"},
     "the columns id, Question, Response; rename Question to prompt and Response to completion"),
    ({"input": "a", "output": "b"}, "the columns input, output; rename input to prompt and output to completion"),
    ({"prompt": "a", "response": "b"}, "the columns prompt, response; rename response to completion"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"},
     "the columns prompt, chosen, rejected; rename chosen to completion"),
    ({"chosen": TALK, "rejected": TALK}, "the columns chosen, rejected; rename chosen to messages"),
    ({"instruction": "a", "context": "c", "response": "b"},
     "the columns instruction, context, response; rename response to output and context to input"),
    ({"instructions": "a", "output": "b"}, "the columns instructions, output; rename instructions to instruction"),
    ({"promt": "a", "completion": "b"}, "the columns promt, completion; rename promt to prompt"),
    ({"conversation": TALK}, "the column conversation; rename conversation to messages"),
    ({"dialog": TURNS}, "the column dialog; rename dialog to conversations"),
    ({"conversation": "a: b"}, "the column conversation"),
    ({"content": "a", "url": "b"}, "the columns content, url; rename content to text"),
    ({"role": "user", "content": "a"},
     "the columns role, content; each row is one message; a row holds all messages of a conversation as a list"),
    ({"a long question, which is the first row?" * 2: "x", "Yes.": "y"},
     "the columns a long question, which is the first r..., Yes.; "
     "the first line seems to be a row already: put the columns' names above it"),
    ({"a": 1, "b": 2}, "the columns a, b"),
    ({f"c{i}": i for i in range(20)}, f"the columns {', '.join(f'c{i}' for i in range(12))} and 8 more"),
    ({0: "a", 1: "b"}, "the columns 0, 1"),
    ({}, "no columns"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), WRONG_COLUMNS, ids=range(len(WRONG_COLUMNS)))
def test_wrong_columns(row: Any, message: str) -> None:
    assert said(row, row) == f"rows.jsonl has {message}; {ACCEPTED}"


def test_what_rows_need_is_said_in_one_way() -> None:
    assert ACCEPTED == (
        'rows need "messages", or "prompt" and "completion", or "instruction" and "output", '
        'or "conversations", or "text"'
    )


def test_columns_that_are_empty_in_all_first_rows() -> None:
    empty = {"prompt": "a", "completion": NAN}
    assert said(empty) == f"rows.jsonl has nothing (None or NaN) in completion in its only row; {ACCEPTED}"
    assert said(*[{"text": None}] * 9) == (
        f"rows.jsonl has nothing (None or NaN) in text in any of its first 9 rows; {ACCEPTED}"
    )
    assert said(empty, {"prompt": None, "completion": "b"}) == (
        f"rows.jsonl has nothing (None or NaN) in prompt or completion in any of its first 2 rows; {ACCEPTED}"
    )


def test_roles_in_the_words_of_another_format() -> None:
    other = [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]
    expected = 'rows.jsonl: the roles in messages are "human" and "gpt"; write "user" and "assistant"'
    assert said({"messages": other}, {"messages": other}) == expected
    assert said({"messages": [USER, {**ANSWER, "role": "Assistant"}]}) == (
        'rows.jsonl: the roles in messages are "Assistant"; write "assistant"'
    )
    # One such row among others is that row's own fault.
    with pytest.raises(RowError, match=r'^the role is "human"; write "user"$'):
        detected({"messages": other}, {"messages": TALK}).convert({"messages": other})
    assert said({"messages": TURNS}) == (
        'rows.jsonl: messages holds turns with "from" and "value"; rename messages to conversations'
    )
