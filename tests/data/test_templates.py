"""The loss mask is exact on the templates of fourteen families: what is learned is in a table written by hand."""

from typing import Any

import pytest

from nbqlora.data.frames import make_frame
from nbqlora.data.messages import RowError
from nbqlora.data.template import Chat
from nbqlora.data.turns import find_answers
from tests.data.families import FAMILIES, NO_THOUGHT, Family, family_tokenizer
from tests.data.learned import ASSISTANT, CONVERSATIONS, SPACED, SYSTEM, USER, Turns, answers, encoded, learned, row

# Where the table's rule does not hold: (family, conversation) -> what is learned.
EXCEPTIONS = {
    # This template takes line breaks away before what follows a thought.
    ("qwen3", "line breaks before"): [NO_THOUGHT + "hello<|im_end|>"],
    ("qwen3_thinking", "line breaks before"): ["\n</think>\n\nhello<|im_end|>"],
    # This tokenizer puts a space behind every special token.
    ("llama2", "a special token in the answer"): ["It is <|im_start|>user\nno</s> <end> so. </s>"],
    ("llama2", "its own special tokens"): ["x <s></s>  y </s>", "</s>  </s>"],
}
REFUSED = {("gemma", "system prompt"): "the chat template refuses this conversation: System role not supported"}
ALL = {**CONVERSATIONS, **SPACED, "its own special tokens": []}


def turns_of(name: str, family: Family) -> Turns:
    if name != "its own special tokens":
        return ALL[name]
    asked = " ".join((*family.special, *family.added))
    return [
        (USER, asked),
        (ASSISTANT, f"x {''.join(family.special[:2])} y"),
        (USER, "?"),
        (ASSISTANT, family.special[1]),
    ]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ALL)
def test_the_answer_and_its_end_are_learned(kind: str, name: str) -> None:
    family, tokenizer = FAMILIES[kind], family_tokenizer(kind)
    turns = turns_of(name, family)
    if (kind, name) in REFUSED:
        with pytest.raises(RowError) as caught:
            encoded(row(turns), tokenizer)
        assert caught.value.reason == REFUSED[kind, name]
        return
    got = encoded(row(turns), tokenizer)
    expected = family.learned(answers(turns), turns[-1][0] == ASSISTANT)
    assert learned(got, tokenizer) == EXCEPTIONS.get((kind, name), expected)
    text = tokenizer.apply_chat_template(row(turns)["messages"], tokenize=False)
    assert tokenizer.decode(got.input_ids.tolist()) == tokenizer.decode(
        tokenizer(text, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_looking_at_one_row_alone_finds_the_same(kind: str) -> None:
    """The two ways of finding answers know nothing of each other."""
    family, tokenizer = FAMILIES[kind], family_tokenizer(kind)
    chat = Chat(tokenizer)
    n_found = 0
    for name in ALL:
        messages = row(turns_of(name, family))["messages"]
        frame = make_frame(chat, [m["role"] for m in messages])
        if frame is None:
            continue
        text = chat.render(messages)
        places = frame.place(text, [m["content"] for m in messages])
        if places is not None:
            assert find_answers(chat, messages, None, text, 0) == frame.learned(places, 0), name
            n_found += 1
    # qwen3_thinking's earlier answers, and thoughts, are found alone only.
    assert n_found >= (15 if kind == "qwen3_thinking" else 20)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_prompt_is_tokenized_as_when_the_model_is_asked(kind: str) -> None:
    tokenizer = family_tokenizer(kind)
    for system in ([], [(SYSTEM, "Be brief.")]):
        turns = [*system, (USER, "What is the capital of France?"), (ASSISTANT, "  The answer: Paris")]
        if system and not FAMILIES[kind].has_system:
            continue
        asked = tokenizer.apply_chat_template(
            row(turns[:-1])["messages"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        got = encoded(row(turns), tokenizer)
        assert got.input_ids[: len(asked)].tolist() == asked
        assert set(got.labels[: len(asked)].tolist()) == {-100}
        assert (got.labels[len(asked) :] != -100).sum() == len(
            tokenizer(_learned_text(kind), add_special_tokens=False)["input_ids"]
        )


def _learned_text(kind: str) -> str:
    (text,) = FAMILIES[kind].learned(["  The answer: Paris"])
    return text


def test_thoughts_are_learned_where_the_template_keeps_them() -> None:
    tokenizer = family_tokenizer("qwen3")
    thought = "<think>\nI add.\n</think>\n\n"
    turns = [(USER, "1+1"), (ASSISTANT, thought + "2"), (USER, "2+2"), (ASSISTANT, thought + "4")]
    assert learned(encoded(row(turns), tokenizer), tokenizer) == ["2<|im_end|>", thought + "4<|im_end|>"]
    asked_to_think = family_tokenizer("qwen3_thinking")
    got = learned(encoded(row(turns), asked_to_think), asked_to_think)
    assert got == ["2<|im_end|>", "I add.\n</think>\n\n4<|im_end|>"]
    apart = row([(USER, "1+1"), (ASSISTANT, "2")])
    apart["messages"][1]["reasoning_content"] = "I add."
    assert learned(encoded(apart, tokenizer), tokenizer) == [thought + "2<|im_end|>"]


def test_a_thought_in_a_channel_of_its_own() -> None:
    tokenizer = family_tokenizer("gpt_oss")
    given = row([(USER, "1+1"), (ASSISTANT, "2")])
    given["messages"][1]["thinking"] = "I add."
    assert learned(encoded(given, tokenizer), tokenizer) == [
        "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>"
    ]


def test_only_the_completions_answers_are_learned() -> None:
    for kind, family in FAMILIES.items():
        tokenizer = family_tokenizer(kind)
        messages = row([(USER, "a"), (ASSISTANT, "not this"), (USER, "b"), (ASSISTANT, "this")])["messages"]
        got: Any = encoded({"prompt": messages[:3], "completion": messages[3:]}, tokenizer)
        assert learned(got, tokenizer) == family.learned(["this"]), kind
