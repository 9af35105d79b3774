"""One conversation, checked: what can be learned from stays, and every other has its reason."""

import json
from typing import Any

import pytest

from nbqlora.data.messages import RowError, check_messages, check_text, is_missing

NAN = float("nan")
SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
RESULT = {"role": "tool", "content": "3"}
LIST = "not a list of {role, content}"
HALF = "holds half of a character, as when an emoji is cut"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}


def calling(calls: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": calls, **more}


GOOD: dict[str, list[dict[str, Any]]] = {
    "one answer": [USER, ANSWER],
    "a system prompt": [SYSTEM, USER, ANSWER],
    "an answer to the system prompt": [SYSTEM, ANSWER],
    "turns": [USER, ANSWER, USER, ANSWER],
    "the user has the last word": [USER, ANSWER, USER],
    "a greeting first": [ANSWER, USER, ANSWER],
    "two questions": [USER, USER, ANSWER],
    "an empty answer": [USER, {"role": "assistant", "content": ""}],
    "an empty question": [{"role": "user", "content": ""}, ANSWER],
    "a tool": [USER, calling([CALL]), RESULT, ANSWER],
    "a tool, with content": [USER, calling([CALL], content="I add."), RESULT, ANSWER],
    "another role": [{"role": "developer", "content": "d"}, USER, ANSWER],
    "emoji": [{"role": "user", "content": "👩‍👩‍👧‍👦"}, {"role": "assistant", "content": "é 日本"}],
    "more keys": [{**USER, "name": "Ann"}, {**ANSWER, "thinking": "b?"}],
}


@pytest.mark.parametrize("name", GOOD)
def test_a_conversation_stays_as_it_is(name: str) -> None:
    given = GOOD[name]
    before = json.dumps(given)
    got = check_messages(given)
    assert got == given
    assert all(ours is not theirs for ours, theirs in zip(got, given, strict=True))
    assert check_messages(tuple(given)) == check_messages(json.dumps(given)) == given
    assert json.dumps(given) == before


WRONG: list[tuple[Any, str]] = [
    (None, "nothing (None or NaN) in messages"),
    (NAN, "nothing (None or NaN) in messages"),
    ("hello", "messages is text, not a list (a CSV file can hold messages only as JSON)"),
    ("[{'role': 'user'}]", "messages is text, not a list (a CSV file can hold messages only as JSON)"),
    ('"hello"', f"messages is str, {LIST}"),
    ("null", "nothing (None or NaN) in messages"),
    (b"hello", f"messages is bytes, {LIST}"),
    (3, f"messages is int, {LIST}"),
    (USER, f"messages is dict, {LIST}"),
    ([], "messages is empty"),
    ([USER, None], "a message that is not an object with role and content"),
    (["hello"], "a message that is not an object with role and content"),
    ([[USER]], "a message that is not an object with role and content"),
    ([USER, {"content": "b"}], "a message without role"),
    ([{"from": "human", "value": "x"}], "a message without role"),
    ([USER, {"role": "assistant"}], "nothing (None or NaN) in content"),
    ([USER, {"role": "assistant", "content": None}], "nothing (None or NaN) in content"),
    ([USER, {"role": "assistant", "content": NAN}], "nothing (None or NaN) in content"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER], "content is list, not text"),
    ([{"role": "user", "content": 3}, ANSWER], "content is int, not text"),
    ([{"role": None, "content": "a"}, ANSWER], "nothing (None or NaN) in role"),
    ([{"role": 1, "content": "a"}, ANSWER], "role is int, not text"),
    ([{"role": "human", "content": "a"}, ANSWER], 'the role is "human"; write "user"'),
    ([USER, {"role": "gpt", "content": "a"}], 'the role is "gpt"; write "assistant"'),
    ([USER, {"role": " Assistant", "content": "a"}], 'the role is " Assistant"; write "assistant"'),
    ([{"role": "user", "content": "a\ud83d"}, ANSWER], f"content {HALF}"),
    ([USER, {"role": "assistant", "content": "\udc4d"}], f"content {HALF}"),
    ([USER], "no assistant turn"),
    ([SYSTEM, USER, USER], "no assistant turn"),
    ([ANSWER], "no turn before the assistant's"),
    ([ANSWER, ANSWER, USER], "no turn before the assistant's"),
    ([SYSTEM, SYSTEM, USER, ANSWER], "more than one system message"),
    ([SYSTEM, USER, SYSTEM, ANSWER], "more than one system message"),
    ([USER, SYSTEM, ANSWER], "a system message that is not the first"),
    ([USER, ANSWER, SYSTEM], "a system message that is not the first"),
    ([{"role": "user", "content": " "}, {"role": "assistant", "content": ""}], "every message is empty"),
    ([USER, calling([])], "nothing (None or NaN) in content"),
    ([USER, calling("add(1, 2)")], "tool_calls is not a list of objects"),
    ([USER, calling(CALL)], "tool_calls is not a list of objects"),
    ([USER, calling(["add"])], "tool_calls is not a list of objects"),
    ([{**USER, "content": None, "tool_calls": [CALL]}, ANSWER], "nothing (None or NaN) in content"),
]


@pytest.mark.parametrize(("messages", "reason"), WRONG, ids=range(len(WRONG)))
def test_a_conversation_that_cannot_be_used(messages: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        check_messages(messages)
    assert (caught.value.reason, str(caught.value)) == (reason, reason)


def test_keys_that_a_table_padded_are_not_there_for_the_template() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    one, other = {"a": 1}, {"city": "Rome"}
    calls = [[{"function": {"name": "f", "arguments": arguments}}] for arguments in (one, other)]
    given = [[{**USER, "name": "Ann"}, calling(calls[0]), RESULT, ANSWER], [USER, calling(calls[1], content="c")]]
    padded = pyarrow.Table.from_pylist([{"messages": messages} for messages in given]).to_pylist()
    assert padded[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "city": None}
    assert [check_messages(row["messages"]) for row in padded] == given


@pytest.mark.parametrize("calls", [[CALL], json.dumps([CALL]), [json.dumps(CALL)], (CALL,)])
def test_tool_calls_are_objects_with_objects_as_arguments(calls: Any) -> None:
    assert check_messages([USER, calling(calls, content=None)]) == [USER, calling([CALL])]


@pytest.mark.parametrize("bare", [True, False])
def test_arguments_as_json_text_are_read(bare: bool) -> None:
    """A template writes them as JSON itself; text it would quote a second time."""
    call = {"name": "add", "arguments": '{"a": 1, "b": null}'}
    read = check_messages([USER, calling([call if bare else {"function": call}])])[1]["tool_calls"][0]
    assert (read if bare else read["function"])["arguments"] == {"a": 1, "b": None}
    odd = {"name": "add", "arguments": "1, 2"}
    assert check_messages([USER, calling([odd])])[1]["tool_calls"] == [odd]


def test_arrays_of_messages_as_pandas_reads_them_from_parquet() -> None:
    numpy = pytest.importorskip("numpy")
    assert check_messages(numpy.array([USER, ANSWER], dtype=object)) == [USER, ANSWER]
    calls = numpy.array([CALL], dtype=object)
    assert check_messages([USER, calling(calls, content=None, weight=NAN)]) == [USER, calling([CALL])]


def test_text() -> None:
    assert check_text(" é🎉\n") == " é🎉\n"
    for value, reason in ((None, "nothing (None or NaN) in text"), (3.5, "text is float, not text"),
                          ("a\ud83db", f"text {HALF}")):  # fmt: skip
        with pytest.raises(RowError) as caught:
            check_text(value)
        assert caught.value.reason == reason


def test_what_is_missing() -> None:
    assert is_missing(None) and is_missing(NAN)
    assert not any(map(is_missing, ("", 0, 0.0, [], float("inf"), "nan")))
    pandas = pytest.importorskip("pandas")
    assert all(map(is_missing, (pandas.NA, pandas.NaT, *pandas.DataFrame({"a": [None, 1.5]})["a"][:1])))
