"""Conversations, and what of them is learned: the text of the supervised tokens."""

from itertools import groupby
from typing import Any

from nbqlora.data.messages import RowError
from nbqlora.data.render import Renderer
from nbqlora.data.tokens import IGNORED, EncodedRow, encode_rendered

Turns = list[tuple[str, str]]
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
CONVERSATIONS: dict[str, Turns] = {
    "single turn": [(USER, "Hello there?"), (ASSISTANT, "Hello, I am fine.")],
    "system prompt": [(SYSTEM, "Be brief."), (USER, "Hello?"), (ASSISTANT, "Yes.")],
    "three turns": [(USER, "a"), (ASSISTANT, "b b"), (USER, "c"), (ASSISTANT, "d"), (USER, "e"), (ASSISTANT, "f\ng")],
    "the user has the last word": [(USER, "a"), (ASSISTANT, "b"), (USER, "c")],
    "the same answer twice": [(USER, "a"), (ASSISTANT, "same"), (USER, "a"), (ASSISTANT, "same")],
    "the question is the answer": [(USER, "same"), (ASSISTANT, "same")],
    "Chinese and Japanese": [(USER, "你好吗？"), (ASSISTANT, "我很好，谢谢。日本語も")],
    "emoji": [(USER, "🎉?"), (ASSISTANT, "👩‍👩‍👧‍👦 yes 🎉")],
    "accents and direction": [(USER, "e\u0301?"), (ASSISTANT, "e\u0301té, \u05e9\u05dc\u05d5\u05dd")],
    "code": [(USER, "add?"), (ASSISTANT, "```python\ndef add(a, b):\n\treturn a + b\n```")],
    "blank lines inside": [(USER, "a"), (ASSISTANT, "one\n\n\ntwo  \n  three")],
    "a special token in the question": [(USER, "what is <|im_end|> or </s>?"), (ASSISTANT, "A token.")],
    "a special token in the answer": [(USER, "a"), (ASSISTANT, "It is <|im_start|>user\nno</s><end> so.")],
    "the role's name in the answer": [(USER, "a"), (ASSISTANT, "assistant\nassistant")],
    "an empty question": [(USER, ""), (ASSISTANT, "b")],
    "an empty answer": [(USER, "a"), (ASSISTANT, "")],
}
SPACED: dict[str, Turns] = {
    "spaces around": [(USER, "a"), (ASSISTANT, "  hello  ")],
    "a space before": [(USER, "a"), (ASSISTANT, " hello")],
    "line breaks before": [(USER, "a"), (ASSISTANT, "\n\nhello")],
    "a tab before": [(USER, "a"), (ASSISTANT, "\thello")],
    "only a space, then more": [(USER, "a"), (ASSISTANT, " "), (USER, " b "), (ASSISTANT, "  c")],
    "line breaks after": [(USER, "a"), (ASSISTANT, "hello\n\n")],
}


def row(turns: Turns) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def encoded(given: dict[str, Any], tokenizer: Any, *, assistant_only_loss: bool = True) -> EncodedRow:
    """The row's tokens. Raises the :class:`RowError` that leaves it out."""
    renderer = Renderer(tokenizer, assistant_only_loss=assistant_only_loss)
    (done,) = encode_rendered(renderer([given]), tokenizer)
    if isinstance(done, RowError):
        raise done
    return done


def learned(given: EncodedRow, tokenizer: Any) -> list[str]:
    """The text of each run of supervised tokens."""
    ids, labels = given.input_ids.tolist(), given.labels.tolist()
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    runs = [list(run) for counts, run in groupby(labels, key=lambda label: label != IGNORED) if counts]
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def answers(turns: Turns) -> list[str]:
    return [content for role, content in turns if role == ASSISTANT]


def whole(given: dict[str, Any], tokenizer: Any) -> list[int]:
    text = tokenizer.apply_chat_template(given["messages"], tools=given.get("tools"), tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
