"""The tokenizer's chat template: rendering, where an answer ends, and a plain template for models without one.

Rendering is transformers' own ``apply_chat_template``, which compiles a template once: 30 microseconds a row.
What ends an answer is not guessed from names: a short conversation is rendered, and the special tokens that
follow its answers are read off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbqlora.core.errors import DataError
from nbqlora.data.messages import RowError

Message = Mapping[str, Any]

PLAIN = "plain"
# "START" is replaced by what this tokenizer begins a document with, so that chat and text rows begin alike.
_PLAIN_TEMPLATE = (
    "START{% for message in messages %}"
    "{% if message.tool_calls %}{{ raise_exception('the plain template has no place for tool calls') }}{% endif %}"
    "{% if message.role == 'tool' %}{{ raise_exception('the plain template has no place for tools') }}{% endif %}"
    "{{ '### ' + message.role | capitalize + ':\\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
NO_TEMPLATE = (
    "this model's tokenizer has no chat template; "
    f'chat_template_path = "{PLAIN}" uses a plain one (### User / ### Assistant)'
)
# Stands for a content; letters and digits only, so that no filter of a template changes it.
MARK = "q7Zx{}xZ7q"
_LONGEST_REASON = 160


class Chat:
    """One tokenizer's chat template.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        special = [*tokenizer.all_special_tokens, *(text for text, is_special in added.items() if is_special)]
        self._any = _one_of([*added, *special])
        self._special = _one_of(special)
        self._ends = self._find_ends()

    def render(self, messages: Sequence[Message], tools: Any = None, *, asks: bool = False) -> str:
        """One conversation as text.

        Args:
            asks: with what the template lets the assistant answer after.

        Raises:
            RowError: the template refuses it.
        """
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=asks)
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = f"the chat template refuses this conversation: {why}"
            raise RowError(reason[:_LONGEST_REASON]) from error

    def mentions(self, name: str, tools: Any = None) -> bool:
        """Whether the template's text has this variable."""
        return re.search(rf"\b{name}\b", self._tokenizer.get_chat_template(tools=tools)) is not None

    def end_of_answer(self, rest: str) -> int:
        """Length of the end token, with the white space before it, at the start of ``rest``; 0 for none."""
        space = len(rest) - len(rest.lstrip())
        return self._end(_run(self._any, rest, space), space)

    def end_of_call(self, rest: str) -> int:
        """The same after a tool call, whose own closing text may stand before the end token."""
        found = self._special.search(rest)
        return self._end(_run(self._special, rest, found.start()), found.start()) if found else 0

    def _end(self, run: Sequence[str], at: int) -> int:
        """Where the end token of a run of special tokens ends: the known one, else the first."""
        known = next((i for i, token in enumerate(run) if token in self._ends), 0)
        return at + len("".join(run[: known + 1])) if run else 0

    def _find_ends(self) -> frozenset[str]:
        """The end tokens: what follows both an earlier and the last answer, or the end of each."""
        for n_turns in (2, 1):
            marks = [MARK.format(i) for i in range(2 * n_turns)]
            roles = ["user", "assistant"] * n_turns
            try:
                text = self.render([{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)])
            except RowError:
                continue
            rests = [text.partition(mark)[2] for mark in marks[1::2]]
            first, *_, last = runs = [_run(self._any, rest, len(rest) - len(rest.lstrip())) for rest in rests]
            same = [a for a, b in zip(first, last, strict=False) if a == b]
            if same and first[: len(same)] == last[: len(same)]:
                return frozenset(same[-1:])
            return frozenset(token for run in runs for token in (run[-1:] if run is last else run[:1]))
        return frozenset()


def _one_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of these; some vocabularies count line breaks and spaces as added tokens, which end nothing."""
    longest_first = sorted({t for t in tokens if t.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _run(pattern: re.Pattern[str], text: str, at: int) -> list[str]:
    """The tokens that stand at ``at``, one directly after another."""
    run = []
    while found := pattern.match(text, at):
        run.append(found.group())
        at = found.end()
    return run


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer begins a document with its bos token."""
    return bool(tokenizer.bos_token) and list(tokenizer("")["input_ids"])[:1] == [tokenizer.bos_token_id]


def apply_chat_template_path(tokenizer: Any, path: str | None) -> None:
    """Give the tokenizer the chat template that the user asked for; it is saved with the tokenizer.

    Args:
        tokenizer: changed in place.
        path: a .jinja file, ``"plain"``, or None for the tokenizer's own.

    Raises:
        DataError: the file is missing or no template, or there is no end token for the plain one.
    """
    if path is None:
        return
    if path == PLAIN:
        if not tokenizer.eos_token:
            raise DataError(
                f'chat_template_path = "{PLAIN}" ends each answer with the end token, and this tokenizer has none '
                "(eos_token); give a .jinja file with a template of its own"
            )
        start = "{{ bos_token }}" if starts_with_bos(tokenizer) else ""
        tokenizer.chat_template = _PLAIN_TEMPLATE.replace("START", start, 1)
        return
    template = _read(path)
    _check(template, path)
    tokenizer.chat_template = template


def _read(path: str) -> str:
    file = Path(path).expanduser()
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"chat_template_path: {path} is not UTF-8 text ({error.reason})") from None
    except (OSError, ValueError, RuntimeError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f'chat_template_path: {path}: {why}; expected a .jinja file, or "{PLAIN}"') from None


def _check(template: str, path: str) -> None:
    """Raise :class:`DataError` where the template cannot be compiled, or does not look at the messages."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=template)
    except TemplateSyntaxError as error:
        raise DataError(f"chat_template_path: {path}, line {error.lineno}: {error.message}") from None
    except (TemplateError, TypeError, ValueError):
        # It compiles; what it refuses is a matter of rows, and of the tokenizer's special tokens.
        pass
    if not re.search(r"\bmessages\b", template):
        raise DataError(f"chat_template_path: {path} is no chat template: it never uses messages")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise :class:`DataError` when this tokenizer cannot give exact loss masks."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("this model has only a slow tokenizer, which gives no character offsets for the loss mask")
