"""The format of a source is found from its first rows and said, and every row is read by it or has its reason."""

import pickle
from typing import Any

import pytest

from nbqlora.data.formats import Format, detect_format
from nbqlora.data.messages import RowError

NAN = float("nan")
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
TALK = [USER, ANSWER]
TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def detected(*rows: dict[str, Any]) -> Format:
    return detect_format(rows, "rows.jsonl")


def converted(row: dict[str, Any]) -> Any:
    """The row as it is rendered, by the format of a source that holds it alone."""
    return detected(row).convert(row)


def reason(row: dict[str, Any], *before: dict[str, Any]) -> str:
    """Why a row cannot be used, where the rows before it decide the format."""
    with pytest.raises(RowError) as caught:
        detected(*before, row).convert(row)
    return caught.value.reason


FOUND: list[tuple[dict[str, Any], str, tuple[str, ...], str]] = [
    ({"messages": TALK}, "messages", ("messages",), "messages"),
    ({"id": 1, "messages": TALK, "tools": [TOOL]}, "messages", ("messages", "tools"), "messages (messages, tools)"),
    ({"prompt": "a", "completion": "b"}, "prompt and completion", ("prompt", "completion"), "prompt and completion"),
    ({"prompt": [USER], "completion": [ANSWER]}, "prompt and completion", ("prompt", "completion"),
     "prompt and completion"),
    ({"instruction": "a", "output": "b"}, "Alpaca", ("instruction", "output"), "Alpaca (instruction, output)"),
    ({"instruction": "a", "input": "", "output": "b"}, "Alpaca", ("instruction", "input", "output"),
     "Alpaca (instruction, input, output)"),
    ({"conversations": TURNS, "system": "s"}, "ShareGPT", ("conversations", "system"),
     "ShareGPT (conversations, system)"),
    ({"text": "a"}, "text", ("text",), "text"),
    ({"Instruction": "a", " OUTPUT ": "b"}, "Alpaca", ("Instruction", " OUTPUT "), "Alpaca (Instruction,  OUTPUT )"),
    ({"Text": "a"}, "text", ("Text",), "text (Text)"),
    # Several are possible: the first of the list in the module's docstring.
    ({"text": "t", "instruction": "a", "output": "b"}, "Alpaca", ("instruction", "output"),
     "Alpaca (instruction, output), not text"),
    ({"text": "t", "prompt": "p", "completion": "c", "messages": TALK}, "messages", ("messages",),
     "messages, not prompt and completion or text"),
    # An empty column is as if it were not there.
    ({"messages": NAN, "prompt": "a", "completion": "b"}, "prompt and completion", ("prompt", "completion"),
     "prompt and completion"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "columns", "title"), FOUND, ids=range(len(FOUND)))
def test_the_format_is_found_and_said(row: Any, name: str, columns: tuple[str, ...], title: str) -> None:
    found = detected(row, {}, row)
    assert (found.name, found.columns, found.title) == (name, columns, title)
    assert found.convert(row)


def test_the_format_that_most_rows_have_is_taken() -> None:
    pair, talk = {"prompt": "a", "completion": "b", "messages": None}, {"messages": TALK, "prompt": None}
    assert detected(talk, pair, pair).title == "prompt and completion, not messages"
    assert detected(talk, pair, pair, talk).title == "messages, not prompt and completion"
    assert reason(pair, talk) == "nothing (None or NaN) in messages"


def test_messages_and_text_stay_as_they_are() -> None:
    assert converted({"messages": TALK, "id": 3}) == {"messages": TALK}
    assert converted({"prompt": "a", "completion": "b"}) == {"prompt": "a", "completion": "b"}
    assert converted({"prompt": [SYSTEM, USER], "completion": [ANSWER]}) == {
        "prompt": [SYSTEM, USER], "completion": [ANSWER],
    }  # fmt: skip
    assert converted({"text": " a\n"}) == {"text": " a\n"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "do", "output": "b"}, [("user", "do"), ("assistant", "b")]),
        ({"instruction": "do", "input": "x\n", "output": "b"}, [("user", "do\n\nx\n"), ("assistant", "b")]),
        ({"instruction": "do", "input": " \n", "output": "b"}, [("user", "do"), ("assistant", "b")]),
        ({"instruction": "do", "input": NAN, "output": "b", "system": None}, [("user", "do"), ("assistant", "b")]),
        ({"instruction": "do", "output": "b", "system": "s"}, [("system", "s"), ("user", "do"), ("assistant", "b")]),
    ],
)
def test_alpaca(row: Any, messages: list[tuple[str, str]]) -> None:
    assert converted(row) == {"messages": [{"role": role, "content": content} for role, content in messages]}


def test_an_input_that_only_later_rows_have_is_not_lost() -> None:
    found = detected({"instruction": "do", "output": "b"})
    assert found.convert({"instruction": "do", "input": "x", "output": "b"})["messages"][0]["content"] == "do\n\nx"
    with_tools = detected({"messages": TALK}).convert({"messages": TALK, "tools": [TOOL]})
    assert with_tools == {"messages": TALK, "tools": [TOOL]}


def test_sharegpt() -> None:
    assert converted({"conversations": TURNS}) == {"messages": TALK}
    assert converted({"conversations": [{"from": "system", "value": "s"}, *TURNS]}) == {"messages": [SYSTEM, *TALK]}
    assert converted({"conversations": TURNS, "system": "s"}) == {"messages": [SYSTEM, *TALK]}
    assert converted({"conversations": TURNS, "system": ""}) == {"messages": TALK}
    assert converted({"conversations": TALK}) == {"messages": TALK}
    padded = [{**turn, "role": None, "content": None, "weight": None} for turn in TURNS]
    assert converted({"conversations": padded}) == {"messages": TALK}
    other = [{"role": "Human", "content": "a"}, {"role": "Model", "content": "b"}]
    assert converted({"conversations": other}) == {"messages": TALK}


def test_sharegpt_with_tools() -> None:
    turns = [
        {"from": "human", "value": "1 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": null}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    assert converted({"conversations": turns, "tools": '[{"name": "add"}]'}) == {
        "messages": [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ],
        "tools": [{"name": "add"}],
    }
    two = [turns[0], {"from": "function_call", "value": '[{"name": "a"}, {"name": "b"}]'}]
    calls = converted({"conversations": two})["messages"][1]["tool_calls"]
    assert [c["function"]["name"] for c in calls] == ["a", "b"]


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        '[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]',
        ['{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}'],
        [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "required": None}}}],
    ],
    ids=["list", "JSON text", "list of JSON texts", "padded by a table"],
)
def test_the_tools_of_a_row(tools: Any) -> None:
    assert converted({"messages": TALK, "tools": tools}) == {"messages": TALK, "tools": [TOOL]}
    assert converted({"prompt": [USER], "completion": [ANSWER], "tools": tools})["tools"] == [TOOL]


@pytest.mark.parametrize("tools", [None, NAN, [], "", " ", "[]"])
def test_no_tools(tools: Any) -> None:
    assert converted({"messages": TALK, "tools": tools}) == {"messages": TALK}


LIST = "not a list of {role, content}"
BOTH = "prompt and completion must both be text, or both lists of messages"
GOOD = {
    "messages": {"messages": TALK},
    "prompt": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "output": "b"},
    "sharegpt": {"conversations": TURNS},
    "text": {"text": "a"},
}
UNUSABLE: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {}, "nothing (None or NaN) in messages"),
    ("messages", {"messages": TALK, "tools": "add"}, "tools is not a list of objects"),
    ("messages", {"messages": TALK, "tools": ["add"]}, "tools is not a list of objects"),
    ("messages", {"messages": TALK, "tools": TOOL}, "tools is not a list of objects"),
    ("prompt", {}, "nothing (None or NaN) in prompt and completion"),
    ("prompt", {"prompt": NAN, "completion": "b"}, "nothing (None or NaN) in prompt"),
    ("prompt", {"prompt": "a", "completion": None}, "nothing (None or NaN) in completion"),
    ("prompt", {"prompt": "a", "completion": 3}, "completion is int, not text"),
    ("prompt", {"prompt": "a", "completion": b"b"}, "completion is bytes, not text"),
    ("prompt", {"prompt": "", "completion": "\n"}, "prompt and completion are empty"),
    ("prompt", {"prompt": "a", "completion": [ANSWER]}, BOTH),
    ("prompt", {"prompt": [USER], "completion": "b"}, BOTH),
    ("prompt", {"prompt": [USER], "completion": []}, "completion is empty"),
    ("prompt", {"prompt": [], "completion": [ANSWER]}, "prompt is empty"),
    ("prompt", {"prompt": [ANSWER], "completion": [USER]}, "no assistant turn in completion"),
    ("prompt", {"prompt": [USER, SYSTEM], "completion": [ANSWER]}, "a system message that is not the first"),
    ("prompt", {"prompt": "a", "completion": "b\ud83d"},
     "completion holds half of a character, as when an emoji is cut"),
    ("alpaca", {"instruction": "a"}, "nothing (None or NaN) in output"),
    ("alpaca", {"instruction": NAN, "input": "x", "output": "b"}, "nothing (None or NaN) in instruction"),
    ("alpaca", {"instruction": "a", "input": 7, "output": "b"}, "input is int, not text"),
    ("alpaca", {"instruction": "", "output": ""}, "every message is empty"),
    ("alpaca", {"instruction": "a", "output": ["b"]}, "output is list, not text"),
    ("sharegpt", {"conversations": None}, "nothing (None or NaN) in conversations"),
    ("sharegpt", {"conversations": []}, "conversations is empty"),
    ("sharegpt", {"conversations": {"from": "human"}}, f"conversations is dict, {LIST}"),
    ("sharegpt", {"conversations": [None, *TURNS]}, "a turn that is not an object with from and value"),
    ("sharegpt", {"conversations": [{"value": "a"}, *TURNS]}, "nothing (None or NaN) in from"),
    ("sharegpt", {"conversations": [{"from": "human", "value": None}, TURNS[1]]}, "nothing (None or NaN) in content"),
    ("sharegpt", {"conversations": [{"from": "Alice", "value": "a"}, TURNS[1]]},
     'a turn is from "Alice"; expected human, gpt, system, function_call or observation'),
    ("sharegpt", {"conversations": TURNS[:1]}, "no assistant turn"),
    ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, *TURNS], "system": "t"},
     "more than one system message"),
    ("sharegpt", {"conversations": [*TURNS, {"from": "function_call", "value": "add(1)"}]},
     "a function_call that is not JSON of an object"),
    ("text", {"text": None}, "nothing (None or NaN) in text"),
    ("text", {"text": " \n"}, "text is empty"),
    ("text", {"text": ["a"]}, "text is list, not text"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "row", "why"), UNUSABLE, ids=range(len(UNUSABLE)))
def test_a_row_that_cannot_be_used(good: str, row: Any, why: str) -> None:
    assert reason(row, GOOD[good], GOOD[good]) == why


def test_what_pandas_writes_for_nothing() -> None:
    pandas = pytest.importorskip("pandas")
    for nothing in (pandas.NA, pandas.NaT):
        assert reason({"prompt": nothing, "completion": "b"}, GOOD["prompt"]) == "nothing (None or NaN) in prompt"
        assert converted({"instruction": "a", "input": nothing, "output": "b"})["messages"] == TALK


def test_rows_are_left_as_they_are_and_formats_travel_to_workers() -> None:
    row = {"conversations": [dict(turn) for turn in TURNS], "system": "s", "tools": [dict(TOOL)]}
    copy = pickle.loads(pickle.dumps(row))
    found = detected(row)
    assert pickle.loads(pickle.dumps(found)).convert(row) == found.convert(row)
    assert row == copy
