"""``chat_template_path``: a file or the plain template, checked, followed and kept with the tokenizer."""

from pathlib import Path
from typing import Any

import pytest

from nbqlora.core.errors import DataError
from nbqlora.data.template import Chat, apply_chat_template_path
from tests.data.families import FAMILIES, family_tokenizer
from tests.data.learned import ASSISTANT, CONVERSATIONS, SPACED, SYSTEM, USER, answers, encoded, learned, row
from tests.data.small_tokenizers import CHATML, byte_level, metaspace, words


def plain(tokenizer: Any) -> Any:
    apply_chat_template_path(tokenizer, "plain")
    return tokenizer


def test_the_plain_template() -> None:
    tokenizer = plain(byte_level())
    messages = row([(SYSTEM, "Be brief."), (USER, "a"), (ASSISTANT, " b ")])["messages"]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "### System:\nBe brief.\n\n### User:\na\n\n### Assistant:\n b <|im_end|>\n\n"
    )
    asked = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert asked == "### System:\nBe brief.\n\n### User:\na\n\n### Assistant:\n"


def test_the_plain_template_teaches_every_answer_and_its_end() -> None:
    tokenizer = plain(byte_level())
    for name, turns in {**CONVERSATIONS, **SPACED}.items():
        got = encoded(row(turns), tokenizer)
        assert learned(got, tokenizer) == [answer + "<|im_end|>" for answer in answers(turns)], name


def test_the_plain_template_begins_as_the_tokenizer_begins_text() -> None:
    tokenizer = plain(metaspace(bos="<s>"))
    got = encoded(row([(USER, "What is the"), (ASSISTANT, "answer")]), tokenizer)
    assert got.input_ids[0] == tokenizer.bos_token_id
    assert got.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert learned(got, tokenizer) == ["answer</s>"]


def test_the_plain_template_has_no_place_for_tools() -> None:
    tokenizer = plain(byte_level())
    with pytest.raises(Exception, match="the plain template has no place for tools"):
        encoded(row([(USER, "a"), ("tool", "b"), (ASSISTANT, "c")]), tokenizer)


def test_a_tokenizer_without_end_token_gets_no_plain_template() -> None:
    tokenizer = words()
    tokenizer.eos_token = None
    with pytest.raises(DataError) as caught:
        plain(tokenizer)
    assert str(caught.value) == (
        'chat_template_path = "plain" ends each answer with the end token, and this tokenizer has none (eos_token); '
        "give a .jinja file with a template of its own"
    )
    assert tokenizer.chat_template is None


def test_a_template_from_a_file_is_kept_with_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "mine.jinja").write_text(CHATML, encoding="utf-8")
    for given in (str(tmp_path / "mine.jinja"), "plain"):
        tokenizer = byte_level("chatml", "{{ messages }}")
        apply_chat_template_path(tokenizer, given)
        tokenizer.save_pretrained(tmp_path / "saved")
        again = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert again.chat_template == tokenizer.chat_template
        assert learned(encoded(row([(USER, "a"), (ASSISTANT, "b")]), again), again) == ["b<|im_end|>"]


def test_nothing_asked_for_leaves_the_tokenizers_own() -> None:
    tokenizer = byte_level()
    apply_chat_template_path(tokenizer, None)
    assert tokenizer.chat_template == CHATML


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, 'no such file; expected a .jinja file, or "plain"'),
        (b"{% for m in messages %}\n{{ m.content }\n{% endfor %}", "unexpected '}'"),
        (b"{% for m in messages %}{{ m.content | shout }}{% endfor %}", "No filter named 'shout'."),
        (b"### User: what?", "is no chat template: it never uses messages"),
        (b"\xff\xfe{\x00", "is not UTF-8 text (invalid start byte)"),
    ],
)
def test_a_template_that_is_missing_or_broken(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    tokenizer = byte_level()
    with pytest.raises(DataError) as caught:
        apply_chat_template_path(tokenizer, str(path))
    assert str(caught.value).startswith(f"chat_template_path: {path}")
    assert message in str(caught.value)
    assert tokenizer.chat_template == CHATML


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(DataError, match=r"mine\.jinja, line 2: "):
        apply_chat_template_path(byte_level(), str(path))


@pytest.mark.parametrize("kind", FAMILIES)
def test_rendering_is_what_transformers_renders(kind: str) -> None:
    tokenizer = family_tokenizer(kind)
    chat = Chat(tokenizer)
    for turns in CONVERSATIONS.values():
        messages = row(turns)["messages"]
        if turns[0][0] == SYSTEM and not FAMILIES[kind].has_system:
            continue
        for asks in (False, True):
            assert chat.render(messages, asks=asks) == tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asks
            )
