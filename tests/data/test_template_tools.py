"""Tools, calls and results: learned where the template has them, a reason to leave the row out where it has not."""

from typing import Any

import pytest

from nbqlora.data.messages import RowError
from tests.data.families import NO_THOUGHT, family_tokenizer
from tests.data.learned import encoded, learned, row, whole
from tests.data.small_tokenizers import CHATML, byte_level

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


ASK = {"role": "user", "content": "Weather in Rome?"}
CALL = {"role": "assistant", "tool_calls": [call(city="Rome", days=3)]}
RESULT = {"role": "tool", "content": '{"sky": "clear"}'}
TELL = {"role": "assistant", "content": "It is clear."}
LATER = [{"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Welcome."}]

JSON = '{"city": "Rome", "days": 3}'
QWEN = f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call><|im_end|>'
DEEPSEEK = (
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{JSON}\n```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
)
# Family: what is learned of the call, of the answer after its result, and of that answer when more follows.
LOOPS = {
    "qwen2_5": (QWEN, "It is clear.<|im_end|>", "It is clear.<|im_end|>"),
    "qwen3": (QWEN, NO_THOUGHT + "It is clear.<|im_end|>", "It is clear.<|im_end|>"),
    "llama3": (f'{{"name": "weather", "parameters": {JSON}}}<|eot_id|>', *["It is clear.<|eot_id|>"] * 2),
    "mistral_v3": (f'[TOOL_CALLS] [{{"name": "weather", "arguments": {JSON}}}]</s>', *["It is clear.</s>"] * 2),
    "deepseek": (DEEPSEEK, *["It is clear.<｜end▁of▁sentence｜>"] * 2),
    "granite": (
        f'<|tool_call|>[{{"name": "weather", "arguments": {JSON}}}]<|end_of_text|>',
        *["It is clear.<|end_of_text|>"] * 2,
    ),
    "gpt_oss": (
        f" to=functions.weather<|channel|>commentary json<|message|>{JSON}<|call|>",
        "<|channel|>final<|message|>It is clear.<|return|>",
        "<|channel|>final<|message|>It is clear.<|end|>",
    ),
}  # fmt: skip


def given(*messages: dict[str, Any], tools: bool = True) -> dict[str, Any]:
    return {"messages": list(messages), **({"tools": TOOLS} if tools else {})}


@pytest.mark.parametrize("kind", LOOPS)
def test_a_call_is_learned_and_its_result_is_not(kind: str) -> None:
    tokenizer = family_tokenizer(kind)
    called, told, told_before = LOOPS[kind]
    # DeepSeek's template has calls, and no place to offer tools.
    offers = kind != "deepseek"
    got = encoded(given(ASK, CALL, RESULT, TELL, tools=offers), tokenizer)
    assert learned(got, tokenizer) == [called, told]
    assert got.input_ids.tolist() == whole(given(ASK, CALL, RESULT, TELL, tools=offers), tokenizer)
    got = encoded(given(ASK, CALL, RESULT, TELL, *LATER, tools=offers), tokenizer)
    assert learned(got, tokenizer)[:2] == [called, told_before]
    got = encoded(given(ASK, CALL, tools=offers), tokenizer)
    assert learned(got, tokenizer) == [(NO_THOUGHT if kind == "qwen3" else "") + called]


def test_what_is_said_beside_a_call_is_learned() -> None:
    for kind, lead in (
        ("qwen2_5", "I look.\n"),
        ("qwen3", "I look.\n"),
        ("deepseek", "I look."),
        ("granite", "I look."),
    ):
        tokenizer = family_tokenizer(kind)
        got = encoded(given(ASK, {**CALL, "content": "I look."}, RESULT, TELL, tools=False), tokenizer)
        assert learned(got, tokenizer)[0] == lead + LOOPS[kind][0], kind


def test_two_calls_in_one_turn() -> None:
    tokenizer = family_tokenizer("qwen2_5")
    two = {"role": "assistant", "content": "", "tool_calls": [call(city="Rome"), call(city="<|im_end|>")]}
    got = encoded(given(ASK, two, RESULT, RESULT, TELL), tokenizer)
    assert learned(got, tokenizer) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "<|im_end|>"}}\n</tool_call><|im_end|>',
        "It is clear.<|im_end|>",
    ]


def test_a_call_written_without_the_word_function() -> None:
    tokenizer = family_tokenizer("qwen2_5")
    bare = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Rome", "days": 3}}]}
    assert learned(encoded(given(ASK, bare), tokenizer), tokenizer) == [QWEN]


LEFT_OUT = "the chat template leaves out what the assistant says, or a part of it"
ONE_CALL = "the chat template refuses this conversation: This model makes one tool call at a time"


@pytest.mark.parametrize(
    ("kind", "row_given", "reason"),
    [
        ("zephyr", given(ASK, TELL), "the chat template has no place for tools"),
        ("phi3", given(ASK, CALL, tools=False), "the chat template has no place for tool calls"),
        ("llama3", given(ASK, {**CALL, "content": "I look."}, RESULT, TELL), LEFT_OUT),
        ("mistral_v3", given(ASK, {**CALL, "content": "I look."}, RESULT, TELL), LEFT_OUT),
        ("gpt_oss", given(ASK, {**CALL, "tool_calls": [call(city="a"), call(city="b")]}), LEFT_OUT),
        ("llama3", given(ASK, {**CALL, "tool_calls": [call(), call()]}), ONE_CALL),
    ],
)  # fmt: skip
def test_what_a_template_has_no_place_for_is_a_reason(kind: str, row_given: dict[str, Any], reason: str) -> None:
    for only_answers in (True, False):
        if reason == LEFT_OUT and not only_answers:
            continue
        with pytest.raises(RowError) as caught:
            encoded(row_given, family_tokenizer(kind), assistant_only_loss=only_answers)
        assert caught.value.reason == reason


QUIET = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] not in quiet %}")


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_role_that_the_template_passes_over_is_a_reason(role: str) -> None:
    """Some templates drop what they do not know, without an error."""
    template = "{% set quiet = ['" + role + "'] %}" + QUIET
    tokenizer = byte_level("chatml", template)
    turns = [(role, "s"), ("user", "a"), ("assistant", "b")]
    for only_answers in (True, False):
        with pytest.raises(RowError) as caught:
            encoded(row(turns), tokenizer, assistant_only_loss=only_answers)
        assert caught.value.reason == f"the chat template leaves out what the {role} says"
    assert learned(encoded(row(turns[1:]), tokenizer), tokenizer) == ["b<|im_end|>"]


ENDLESS = CHATML.replace("<|im_end|>\n", "\n")
SIZED = "{{ messages[-1]['content'] | length }}" + CHATML
SHOUTING = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | replace('a', 'A') }}")
COUNTING = "{% set n = messages | length %}" + CHATML.replace("{{ m['role'] }}\n", "{{ m['role'] }}\n[{{ n }}] ")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ENDLESS, "the chat template writes no special token after an answer, so the model would not learn to end; "),
        (SIZED, "the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart; "),
        (SHOUTING, "the chat template changes what an answer says, so the learned text cannot be checked; "),
    ],
)
def test_what_cannot_be_told_apart_is_a_reason(template: str, reason: str) -> None:
    tokenizer = byte_level("chatml", template)
    turns = [("user", "a"), ("assistant", "an answer"), ("user", "a"), ("assistant", "and more than that")]
    with pytest.raises(RowError) as caught:
        encoded(row(turns), tokenizer)
    assert caught.value.reason.startswith(reason)
    assert caught.value.reason.endswith("or set assistant_only_loss = false")
    # The way out that the reason names.
    assert encoded(row(turns), tokenizer, assistant_only_loss=False).n_learned > 0


def test_a_template_that_counts_the_turns_is_followed() -> None:
    tokenizer = byte_level("chatml", COUNTING)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert learned(encoded(row(turns), tokenizer), tokenizer) == ["b<|im_end|>", "d<|im_end|>"]
