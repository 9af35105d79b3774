"""Prompt and completion, and the tokenizers that are not byte-level: the loss counts exactly the completion."""

from typing import Any

import pytest

from nbqlora.core.errors import DataError
from nbqlora.data.messages import RowError
from nbqlora.data.template import check_tokenizer
from nbqlora.data.tokens import IGNORED
from tests.data.learned import ASSISTANT, CONVERSATIONS, SYSTEM, USER, answers, encoded, learned, row, whole
from tests.data.small_tokenizers import byte_level, metaspace, words

PAIRS = {
    "text": ("Q: What?\nA:", " Paris."),
    "Chinese": ("问：", "答案🎉"),
    "an empty prompt": ("", "Once upon"),
    "a space at the prompt's end": ("Q: What? A: ", "Paris."),
    "a word cut in two": ("The capital of Fra", "nce"),
    "a line break on both sides": ("Q\n", "\n\nA"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_prompt_and_completion_as_text(name: str, demo_tokenizer: Any) -> None:
    prompt, completion = PAIRS[name]
    got = encoded({"prompt": prompt, "completion": completion}, demo_tokenizer)
    expected = completion + "<|im_end|>"
    if name == "an empty prompt":
        first = demo_tokenizer.decode(got.input_ids[:1])
        expected = expected.removeprefix(first)
    assert learned(got, demo_tokenizer) == [expected]
    assert demo_tokenizer.decode(got.input_ids.tolist()) == prompt + completion + "<|im_end|>"
    if prompt:
        asked = demo_tokenizer(prompt)["input_ids"]
        assert got.input_ids[: len(asked)].tolist() == asked


def test_an_end_that_is_written_is_not_written_twice(demo_tokenizer: Any) -> None:
    got = encoded({"prompt": "a", "completion": " b<|im_end|>"}, demo_tokenizer)
    assert learned(got, demo_tokenizer) == [" b<|im_end|>"]


def test_text_rows_with_loss_on_everything(demo_tokenizer: Any) -> None:
    got = encoded({"prompt": "a", "completion": " b"}, demo_tokenizer, assistant_only_loss=False)
    assert got.labels.tolist() == [IGNORED, *got.input_ids[1:].tolist()]


def test_prompt_and_completion_as_messages(demo_tokenizer: Any) -> None:
    prompt = row([(SYSTEM, "s"), (USER, "a"), (ASSISTANT, "not this"), (USER, "b")])["messages"]
    completion = row([(ASSISTANT, "this"), (USER, "c"), (ASSISTANT, "and this")])["messages"]
    got = encoded({"prompt": prompt, "completion": completion}, demo_tokenizer)
    assert learned(got, demo_tokenizer) == ["this<|im_end|>", "and this<|im_end|>"]
    assert got.input_ids.tolist() == whole({"messages": [*prompt, *completion]}, demo_tokenizer)


def test_text_begins_with_the_token_that_the_tokenizer_puts_first() -> None:
    with_bos, without = metaspace(bos="<s>"), metaspace()
    row_of_text = {"prompt": "What is the", "completion": " answer"}
    assert encoded(row_of_text, with_bos).input_ids[0] == with_bos.bos_token_id
    assert encoded(row_of_text, with_bos).input_ids.tolist().count(with_bos.bos_token_id) == 1
    assert (
        encoded({**row_of_text, "prompt": "<s>What is the"}, with_bos).input_ids.tolist().count(with_bos.bos_token_id)
        == 1
    )
    assert with_bos.convert_tokens_to_ids("<s>") not in encoded(row_of_text, without).input_ids
    assert learned(encoded(row_of_text, with_bos), with_bos) == ["answer</s>"]
    # A chat template writes it itself.
    chat = encoded(row([(USER, "a"), (ASSISTANT, "the answer")]), with_bos)
    assert chat.input_ids.tolist().count(with_bos.bos_token_id) == 1


def test_a_tokenizer_that_puts_a_space_first_keeps_the_answers_first_token() -> None:
    tokenizer = metaspace()
    turns = [(USER, "What is the answer?"), (ASSISTANT, "The answer is Paris."), (USER, "Yes?"), (ASSISTANT, "Yes.")]
    got = encoded(row(turns), tokenizer)
    assert learned(got, tokenizer) == ["The answer is Paris.</s>", "Yes.</s>"]
    # "A: " + "Yes" is one token "▁Yes": it cannot be split without another space, and it is the answer's.
    pair = encoded({"prompt": "What is the answer? ", "completion": "Yes"}, tokenizer)
    assert learned(pair, tokenizer) == ["Yes</s>"]
    assert pair.input_ids.tolist() == tokenizer("What is the answer? Yes</s>", add_special_tokens=False)["input_ids"]


def test_offsets_that_leave_spaces_out_lose_no_token() -> None:
    tokenizer = byte_level("chatml", trim_offsets=True)
    for name in ("single turn", "three turns", "blank lines inside", "code", "Chinese and Japanese", "emoji"):
        turns = CONVERSATIONS[name]
        got = encoded(row(turns), tokenizer)
        assert learned(got, tokenizer) == [answer + "<|im_end|>" for answer in answers(turns)], name


def test_whole_words() -> None:
    tokenizer = words()
    got = encoded({"prompt": "w1 w2 w3 ", "completion": "w4  w5"}, tokenizer)
    assert got.input_ids.tolist() == tokenizer.convert_tokens_to_ids(["w1", "w2", "w3", "w4", "w5", "</s>"])
    assert got.labels.tolist() == [IGNORED] * 3 + got.input_ids[3:].tolist()


def test_a_tokenizer_without_offsets_or_template_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError) as caught:
        check_tokenizer(Slow())
    assert str(caught.value) == (
        "this model has only a slow tokenizer, which gives no character offsets for the loss mask"
    )
    check_tokenizer(words())
    with pytest.raises(DataError) as caught:
        encoded(row([(USER, "a"), (ASSISTANT, "b")]), words())
    assert str(caught.value) == (
        "this model's tokenizer has no chat template; "
        'chat_template_path = "plain" uses a plain one (### User / ### Assistant)'
    )


def test_text_rows_are_learned_but_for_their_first_token() -> None:
    tokenizer = metaspace(bos="<s>")
    got = encoded({"text": "What is the answer?"}, tokenizer)
    assert got.input_ids[0] == tokenizer.bos_token_id
    assert got.input_ids[-1] == tokenizer.eos_token_id
    assert learned(got, tokenizer) == ["What is the answer?</s>"]
    plain = encoded({"text": "w1 w2 w3"}, words())
    assert plain.labels.tolist() == [IGNORED, *plain.input_ids[1:].tolist()]
    assert learned(plain, words()) == ["w2 w3 </s>"]


def test_half_of_a_character_leaves_a_row_out(demo_tokenizer: Any) -> None:
    for given in ({"text": "a\ud83d"}, row([(USER, "a\ud83d"), (ASSISTANT, "b")])):
        with pytest.raises(RowError, match="holds half of a character, as when an emoji is cut"):
            encoded(given, demo_tokenizer)


def test_an_answer_whose_tokens_read_as_something_else_is_left_out() -> None:
    """A tokenizer that reads a word as another one, behind a certain word: its offsets do not tell."""
    from tokenizers import normalizers

    tokenizer = words()
    given = {"prompt": "w1", "completion": " w2"}
    assert learned(encoded(given, tokenizer), tokenizer) == ["w2 </s>"]
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("w1 w2", "w1 w3")
    with pytest.raises(RowError, match=r"^the answer's tokens do not read as its text$"):
        encoded(given, tokenizer)


def test_repr_holds_no_tokens(demo_tokenizer: Any) -> None:
    assert repr(encoded(row(CONVERSATIONS["single turn"]), demo_tokenizer)) == "EncodedRow(41 tokens, 7 learned)"


def test_a_blank_line_before_an_answer_is_tokenized_as_when_the_model_is_asked(demo_tokenizer: Any) -> None:
    """GPT-2's way to find words makes two tokens of a blank line that a word follows, and one where it ends."""
    prompt = "### Question:\nWhat?\n\n### Answer:\n\n"
    asked = demo_tokenizer(prompt)["input_ids"]
    assert demo_tokenizer(prompt + "Paris")["input_ids"][: len(asked)] != asked
    got = encoded({"prompt": prompt, "completion": "Paris"}, demo_tokenizer)
    assert got.input_ids[: len(asked)].tolist() == asked
    assert learned(got, demo_tokenizer) == ["Paris<|im_end|>"]
