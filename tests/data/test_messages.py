"""Rows that are not what they should be: the row, the message and what was expected."""

from typing import Any

import pytest

from nbqlora.core.errors import DataError
from nbqlora.data.render import encode_row
from tests.data.small_tokenizers import byte_level

NEED = 'rows need "messages", or "prompt" and "completion"'
NAN = float("nan")
USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
LIST = "row 3 of x: messages must be a list of {role, content}, got"
PART = [{"type": "text", "text": "a"}]
WRONG: list[tuple[Any, str]] = [
    ({}, f"row 3 of x has the columns (none); {NEED}"),
    ({"text": "a", "id": 3}, f"row 3 of x has the columns text, id; {NEED}"),
    ({"conversations": [{"from": "human", "value": "a"}]}, f"row 3 of x has the columns conversations; {NEED}"),
    ({"prompt": "a"}, f"row 3 of x has the columns prompt; {NEED}"),
    ({"messages": None}, f"row 3 of x has nothing (None or NaN) in messages; {NEED}"),
    ({"messages": NAN, "prompt": "a", "completion": NAN},
     f"row 3 of x has nothing (None or NaN) in messages and completion; {NEED}"),
    ({"prompt": None, "completion": "b"}, f"row 3 of x has nothing (None or NaN) in prompt; {NEED}"),
    ({"messages": "hello"}, f"{LIST} str"),
    ({"messages": b"hello"}, f"{LIST} bytes"),
    ({"messages": 3}, f"{LIST} int"),
    ({"messages": USER}, f"{LIST} dict"),
    ({"messages": []}, "row 3 of x: messages is empty; expected at least one {role, content}"),
    ({"messages": [USER, None]}, "row 3 of x, message 2: expected role and content, got 'None'"),
    ({"messages": ["hello"]}, "row 3 of x, message 1: expected role and content, got 'hello'"),
    ({"messages": [USER, {"content": "b"}]},
     "row 3 of x, message 2: expected role and content, got \"{'content': 'b'}\""),
    ({"messages": [{"role": "user"}]}, "row 3 of x, message 1: expected role and content, got \"{'role': 'user'}\""),
    ({"messages": [{"from": "human", "value": "x" * 99}]},
     "row 3 of x, message 1: expected role and content, got "
     "\"{'from': 'human', 'value': 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\""),
    ({"messages": [{"role": "user", "content": None}]},
     "row 3 of x, message 1: content must be text, got nothing (None or NaN)"),
    ({"messages": [USER, {"role": "assistant", "content": NAN}]},
     "row 3 of x, message 2: content must be text, got nothing (None or NaN)"),
    ({"messages": [{"role": "user", "content": PART}]}, "row 3 of x, message 1: content must be text, got list"),
    ({"messages": [{"role": "user", "content": 3}]}, "row 3 of x, message 1: content must be text, got int"),
    ({"messages": [{"role": None, "content": "a"}]},
     "row 3 of x, message 1: role must be text, got nothing (None or NaN)"),
    ({"messages": [{"role": 1, "content": "a"}]}, "row 3 of x, message 1: role must be text, got int"),
    ({"messages": [{"role": "human", "content": "a"}]}, 'row 3 of x, message 1: the role is "human"; write "user"'),
    ({"messages": [USER, {"role": "gpt", "content": "a"}]},
     'row 3 of x, message 2: the role is "gpt"; write "assistant"'),
    ({"messages": [USER, {"role": "Assistant", "content": "a"}]},
     'row 3 of x, message 2: the role is "Assistant"; write "assistant"'),
    ({"prompt": "a", "completion": [ANSWER]},
     "row 3 of x: prompt and completion must both be text, or both lists of messages"),
    ({"prompt": [USER], "completion": "b"},
     "row 3 of x: prompt and completion must both be text, or both lists of messages"),
    ({"prompt": 3, "completion": 4}, "row 3 of x, prompt: messages must be a list of {role, content}, got int"),
    ({"prompt": [USER], "completion": [{"role": "assistant"}]},
     "row 3 of x, completion, message 1: expected role and content, got \"{'role': 'assistant'}\""),
    ({"prompt": "a", "completion": "b\ud83d"},
     "row 3 of x: the text holds half of a character (U+D83D), as when an emoji is cut"),
    ({"messages": [USER, {"role": "assistant", "content": "\udc4d"}]},
     "row 3 of x: the text holds half of a character (U+DC4D), as when an emoji is cut"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level("chatml")


@pytest.mark.parametrize(("row", "message"), WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize("assistant_only_loss", [True, False])
def test_a_wrong_row(row: Any, message: str, assistant_only_loss: bool, tokenizer: Any) -> None:
    with pytest.raises(DataError) as caught:
        encode_row(row, tokenizer, assistant_only_loss=assistant_only_loss, where="row 3 of x")
    assert str(caught.value) == message


def test_what_pandas_writes_for_nothing() -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match=r"^row 1 of x has nothing \(None or NaN\) in prompt"):
        encode_row({"prompt": pandas.NA, "completion": "b"}, None, assistant_only_loss=True, where="row 1 of x")


def test_a_column_of_nothing_beside_the_other_form_is_passed_over(tokenizer: Any) -> None:
    text = {"prompt": "a", "completion": "b"}
    padded = {**text, "messages": NAN}
    got = encode_row(padded, tokenizer, assistant_only_loss=True, where="row 1 of x")
    assert got == encode_row(text, tokenizer, assistant_only_loss=True, where="row 1 of x")


def test_arrays_and_tuples_of_messages(tokenizer: Any) -> None:
    numpy = pytest.importorskip("numpy")
    expected = encode_row({"messages": [USER, ANSWER]}, tokenizer, assistant_only_loss=True, where="x")
    for messages in ((USER, ANSWER), numpy.array([USER, ANSWER], dtype=object)):
        assert encode_row({"messages": messages}, tokenizer, assistant_only_loss=True, where="x") == expected


def test_keys_that_a_table_padded_with_none_are_not_there_for_the_template() -> None:
    picky = (
        "{% for m in messages %}{% if 'tool_calls' in m %}{{ raise_exception('a tool call') }}{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_level("chatml", picky)
    padded = [{**m, "tool_calls": None, "name": None} for m in (USER, ANSWER)]
    got = encode_row({"messages": padded}, tokenizer, assistant_only_loss=True, where="x")
    assert got == encode_row({"messages": [USER, ANSWER]}, tokenizer, assistant_only_loss=True, where="x")


def test_the_users_messages_are_left_as_they_are(tokenizer: Any) -> None:
    messages = [{**USER, "tool_calls": None}, dict(ANSWER)]
    encode_row({"messages": messages}, tokenizer, assistant_only_loss=True, where="x")
    assert messages == [{**USER, "tool_calls": None}, ANSWER]


def test_other_roles_are_the_templates_matter(tokenizer: Any) -> None:
    messages = [{"role": "developer", "content": "a"}, {"role": "tool", "content": "3"}, ANSWER]
    assert encode_row({"messages": messages}, tokenizer, assistant_only_loss=True, where="x").n_supervised == 2
