"""The ids that mean something, what is put around a text, and the chat template.

llama.cpp has ids of its own where a file names none (11 ends a text of a byte-level tokenizer), so that the beginning
and the end are always named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbqlora.core.errors import ModelError

# What llama.cpp takes for the end of an answer by its text alone.
_KNOWN_ENDS = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "<EOT>")
)
_PHI_3_KEEPS = frozenset(("<unk>", "<s>", "<|endoftext|>"))


@dataclass(frozen=True, kw_only=True)
class Special:
    """Special tokens.

    Args:
        ids: by llama.cpp's word: bos, eos, eot, unknown, padding.
        adds_bos, adds_eos: around every text, a chat included.
        chat_template: Jinja by name, ``default`` the one that is used; empty when there is none.
        strips_after: whether spaces after special tokens are dropped, as Phi-3's tokenizer has it.
    """

    ids: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: Mapping[str, str]
    strips_after: bool


def read_special(
    tokenizer: Any, config: Any, folder: Path, tokens: Sequence[str], *, byte_level: bool
) -> tuple[Special, list[str]]:
    """Read them, with notes on what llama.cpp does otherwise.

    Raises:
        ModelError: nothing ends a text, or something is put around a text that llama.cpp cannot put there.
    """
    ids = _ids(tokenizer, config, len(tokens))
    ends = _ends(folder)
    others = [i for i in ends if i < len(tokens) and i != ids["eos"] and tokens[i] not in _KNOWN_ENDS]
    if others:
        ids["eot"] = others[0]
    (adds_bos, adds_eos), notes = _in_chat(tokenizer, _around(tokenizer, ids))
    strips_after, told = _stripping(tokenizer)
    notes += told
    if len(others) > 1:
        notes.append(f"llama.cpp does not end an answer at {', '.join(tokens[i] for i in others[1:])}")
    special = Special(
        ids=ids,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        chat_template=_templates(tokenizer.chat_template),
        strips_after=strips_after and not byte_level,
    )
    return special, notes


def chat_text(tokenizer: Any) -> str | None:
    """A short chat as the model sees it; None where there is no template, or none for a plain question."""
    from jinja2 import TemplateError

    question, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}
    for chat in ([question, answer, question], [question]) if tokenizer.chat_template else ():
        try:
            return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        except (TemplateError, ValueError, TypeError, KeyError):
            continue
    return None


def _ids(tokenizer: Any, config: Any, rows: int) -> dict[str, int]:
    def known(value: Any) -> int | None:
        first = value[0] if isinstance(value, list | tuple) and value else value
        return first if isinstance(first, int) and 0 <= first < rows else None

    eos = _first(known(tokenizer.eos_token_id), known(getattr(config, "eos_token_id", None)))
    if eos is None:
        raise ModelError("GGUF needs a token that ends a text (eos); neither the tokenizer nor config.json names one")
    bos = _first(known(tokenizer.bos_token_id), known(getattr(config, "bos_token_id", None)), eos)
    named = {"bos": bos, "eos": eos, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    return {word: i for word, i in named.items() if known(i) is not None}


def _first(*values: int | None) -> int | None:
    return next((v for v in values if v is not None), None)


def _ends(folder: Path) -> list[int]:
    """All ids that end an answer, from ``generation_config.json``."""
    try:
        value = json.loads((folder / "generation_config.json").read_text("utf-8")).get("eos_token_id")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"cannot read {folder / 'generation_config.json'}: {error}") from error
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def _around(tokenizer: Any, ids: Mapping[str, int]) -> tuple[bool, bool]:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for before in ((), (ids["bos"],)):
        for after in ((), (ids["eos"],)):
            if whole == [*before, *bare, *after]:
                return bool(before), bool(after)
    raise ModelError(
        f"the tokenizer makes {tokenizer.convert_ids_to_tokens(whole)} of 'a'; "
        "llama.cpp puts nothing but bos before and eos after a text"
    )


def _in_chat(tokenizer: Any, around: tuple[bool, bool]) -> tuple[tuple[bool, bool], list[str]]:
    """What llama.cpp puts around a chat too, while transformers puts around it only what the template has."""
    chat = chat_text(tokenizer)
    if chat is None:
        return around, []
    adds_bos = around[0] and chat.startswith(tokenizer.bos_token or "")
    left_out = [word for word, was, now in (("bos", around[0], adds_bos), ("eos", around[1], False)) if was and not now]
    if not left_out:
        return (adds_bos, False), []
    note = f"llama.cpp adds no {' and '.join(left_out)} to a text, as in the chat; transformers does outside of a chat"
    return (adds_bos, False), [note]


def _stripping(tokenizer: Any) -> tuple[bool, list[str]]:
    """Whether spaces after special tokens are dropped in the one way that llama.cpp knows (Phi-3's), and notes."""
    added = tokenizer.added_tokens_decoder.values()
    right = {token.content for token in added if token.rstrip}
    left = [token.content for token in added if token.lstrip]
    every = {token.content for token in added}
    # llama.cpp asks for these four by name, and loads no file without them.
    phi_3 = right == every - _PHI_3_KEEPS and every >= {"</s>", *_PHI_3_KEEPS}
    wrong = [*left, *([] if phi_3 else sorted(right))]
    notes = [f"llama.cpp keeps spaces around {', '.join(wrong[:5])}, transformers drops them"] if wrong else []
    return phi_3 and not left, notes


def _templates(given: Any) -> dict[str, str]:
    return dict(given) if isinstance(given, Mapping) else {"default": given} if given else {}
