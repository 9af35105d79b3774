"""The loss counts exactly what the assistant says: checked by decoding the supervised tokens."""

from typing import Any

import pytest

from nbqlora.data.messages import RowError
from nbqlora.data.tokens import IGNORED
from tests.data.learned import (
    ASSISTANT,
    CONVERSATIONS,
    SPACED,
    SYSTEM,
    USER,
    Turns,
    answers,
    encoded,
    learned,
    row,
    whole,
)
from tests.data.small_tokenizers import (
    CHATML,
    CHATML_MARKED,
    CHATML_WITHOUT_PROMPT,
    END,
    FORGETFUL,
    THINKING,
    byte_level,
)


@pytest.fixture(scope="module", params=["chatml", "llama3", "mistral", "zephyr", "gemma"])
def family(request: pytest.FixtureRequest) -> Any:
    return request.param, byte_level(request.param)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_demo_model_learns_the_answer_and_its_end(name: str, demo_tokenizer: Any) -> None:
    turns = CONVERSATIONS[name]
    got = encoded(row(turns), demo_tokenizer)
    assert learned(got, demo_tokenizer) == [answer + "<|im_end|>" for answer in answers(turns)]
    assert got.input_ids.tolist() == whole(row(turns), demo_tokenizer)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_each_family_learns_the_answer_and_its_end(name: str, family: Any) -> None:
    kind, tokenizer = family
    turns = CONVERSATIONS[name]
    got = encoded(row(turns), tokenizer)
    # The space that Mistral's template puts before an answer is the answer's to write.
    lead = " " if kind == "mistral" else ""
    assert learned(got, tokenizer) == [lead + answer + END[kind] for answer in answers(turns)]
    if kind == "llama3":
        # A blank line stands before each answer: this tokenizer makes it one token where the model is asked.
        assert tokenizer.decode(got.input_ids.tolist()) == tokenizer.decode(whole(row(turns), tokenizer))
    else:
        assert got.input_ids.tolist() == whole(row(turns), tokenizer)


@pytest.mark.parametrize("name", SPACED)
def test_spaces_around_an_answer_belong_to_it(name: str, demo_tokenizer: Any) -> None:
    turns = SPACED[name]
    for tokenizer in (demo_tokenizer, byte_level("chatml")):
        got = encoded(row(turns), tokenizer)
        assert learned(got, tokenizer) == [answer + "<|im_end|>" for answer in answers(turns)]
        text = tokenizer.apply_chat_template(row(turns)["messages"], tokenize=False)
        assert tokenizer.decode(got.input_ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", SPACED)
def test_a_template_that_trims_teaches_the_trimmed_answer(name: str) -> None:
    for kind in ("llama3", "gemma"):
        tokenizer = byte_level(kind)
        turns = SPACED[name]
        expected = [answer.strip() + END[kind] for answer in answers(turns)]
        assert learned(encoded(row(turns), tokenizer), tokenizer) == expected


def test_the_prompt_is_tokenized_as_when_the_model_is_asked(demo_tokenizer: Any) -> None:
    turns = SPACED["spaces around"]
    got = encoded(row(turns), demo_tokenizer)
    prompt = demo_tokenizer.apply_chat_template(
        row(turns[:1])["messages"], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert got.input_ids[: len(prompt)].tolist() == prompt
    assert set(got.labels[: len(prompt)].tolist()) == {IGNORED}
    assert got.labels[len(prompt)] != IGNORED


def test_equal_to_generation_markers() -> None:
    marked, plain = byte_level("chatml", CHATML_MARKED), byte_level("chatml", CHATML)
    for turns in CONVERSATIONS.values():
        messages = row(turns)["messages"]
        truth = marked.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        got = encoded(row(turns), plain)
        assert got.input_ids.tolist() == truth["input_ids"]
        assert [label != IGNORED for label in got.labels] == [bool(m) for m in truth["assistant_masks"]]


def test_the_assistant_may_begin(demo_tokenizer: Any) -> None:
    turns = [(ASSISTANT, "Welcome."), (USER, "a"), (ASSISTANT, "b")]
    for tokenizer in (demo_tokenizer, byte_level("chatml")):
        assert learned(encoded(row(turns), tokenizer), tokenizer) == ["Welcome.<|im_end|>", "b<|im_end|>"]
    assert learned(encoded(row(turns[:1]), demo_tokenizer), demo_tokenizer) == ["Welcome.<|im_end|>"]


def test_a_template_without_generation_prompt() -> None:
    tokenizer = byte_level("chatml", CHATML_WITHOUT_PROMPT)
    for name, turns in {**CONVERSATIONS, **SPACED}.items():
        got = learned(encoded(row(turns), tokenizer), tokenizer)
        assert got == [answer + "<|im_end|>" for answer in answers(turns)], name


def test_without_an_assistant_there_is_nothing_to_learn(demo_tokenizer: Any) -> None:
    assert encoded(row([(USER, "a")]), demo_tokenizer).n_learned == 0
    assert encoded(row([(SYSTEM, "a"), (USER, "b")]), demo_tokenizer).n_learned == 0


def test_a_template_that_drops_earlier_thoughts_teaches_what_is_left() -> None:
    tokenizer = byte_level("chatml", FORGETFUL)
    turns = [(USER, "a"), (ASSISTANT, "<think>x</think>b"), (USER, "c"), (ASSISTANT, "<think>y</think>d")]
    assert learned(encoded(row(turns), tokenizer), tokenizer) == ["b<|im_end|>", "<think>y</think>d<|im_end|>"]
    assert learned(encoded(row(turns[:2]), tokenizer), tokenizer) == ["<think>x</think>b<|im_end|>"]
    all_of_it = encoded(row(turns), tokenizer, assistant_only_loss=False)
    assert all_of_it.n_learned == len(all_of_it.input_ids) - 1
    # Nothing to drop, nothing to fear.
    fine = [(USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d")]
    assert learned(encoded(row(fine), tokenizer), tokenizer) == ["b<|im_end|>", "d<|im_end|>"]


def test_an_answer_that_does_not_begin_as_the_template_lets_it() -> None:
    tokenizer = byte_level("chatml", THINKING)
    with pytest.raises(RowError) as caught:
        encoded(row([(USER, "a"), (ASSISTANT, "b")]), tokenizer)
    assert caught.value.reason == (
        "the chat template lets an answer begin after '<|im_start|>assistant\\n<think>\\n', and this one does not; "
        "put what is missing into its content, or set assistant_only_loss = false"
    )
    got = encoded(row([(USER, "a"), (ASSISTANT, "<think>\nx</think>b")]), tokenizer)
    assert learned(got, tokenizer) == ["x</think>b<|im_end|>"]


@pytest.mark.parametrize("turns", [[(USER, "a"), (USER, "b"), (ASSISTANT, "c")], [(ASSISTANT, "a")]])
def test_a_template_that_refuses_the_order_of_roles(turns: Turns) -> None:
    with pytest.raises(RowError) as caught:
        encoded(row(turns), byte_level("gemma"))
    assert caught.value.reason == (
        "the chat template refuses this conversation: "
        "Conversation roles must alternate user/assistant/user/assistant/..."
    )


def test_a_template_that_fails_on_its_own() -> None:
    tokenizer = byte_level("chatml", "{% for m in messages %}{{ m['content'] + 3 }}{% endfor %}")
    with pytest.raises(RowError, match=r"^the chat template refuses this conversation: can only concat"):
        encoded(row([(USER, "a"), (ASSISTANT, "b")]), tokenizer)


def test_loss_on_everything(demo_tokenizer: Any) -> None:
    for turns in CONVERSATIONS.values():
        got = encoded(row(turns), demo_tokenizer, assistant_only_loss=False)
        assert got.input_ids.tolist() == whole(row(turns), demo_tokenizer)
        # Nothing predicts the first token.
        assert got.labels.tolist() == [IGNORED, *got.input_ids[1:].tolist()]
