r"""How a text is split before its pieces are joined: transformers writes it out, llama.cpp knows it by a name.

``tokenizer.json`` has the expressions themselves; llama.cpp has them compiled in and picks by ``tokenizer.ggml.pre``.
A wrong name is never noticed: the file loads, and numbers or code become other tokens than those that were trained.
So only what stands here, expression for expression, gets a name, and everything else is an error.

Source of the names and of what llama.cpp does by them: its vocabulary of b9190 and newer; each row has a test in which
llama.cpp gives transformers' ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbqlora.core.errors import ModelError

DIGITS = r"\p{N}"
# What a ByteLevel pre-tokenizer does when it splits by itself.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}|", r"\p{N}|")
QWEN_3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"

# Expressions in order, and whether a piece that is a token as a whole is taken as it is (``ignore_merges``).
SPLITS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((GPT_2,), False): "gpt-2",
    ((DIGITS, GPT_2), False): "smollm",
    ((LLAMA_3,), True): "llama-bpe",
    ((LLAMA_3,), False): "dbrx",
    ((QWEN_2,), False): "qwen2",
    ((QWEN_3_5,), False): "qwen35",
    ((TEKKEN,), True): "tekken",
    ((GPT_4O,), False): "gpt-4o",
    ((SEED,), False): "seed-coder",
}

# Where llama.cpp's expression is not quite the same.
_MARKS = "llama.cpp splits words at combining marks (Hindi, Thai, accents typed as signs), transformers does not"
SPLIT_NOTES: Mapping[str, str] = {"tekken": _MARKS, "gpt-4o": _MARKS}


def split_name(raw: Mapping[str, Any]) -> str:
    """llama.cpp's name for the splitting of a byte-level tokenizer.

    Args:
        raw: ``tokenizer.json`` as plain values.

    Raises:
        ModelError: no name stands for it.
    """
    found = tuple(_expressions(raw["pre_tokenizer"]))
    ignores_merges = bool(raw["model"].get("ignore_merges", False))
    name = SPLITS.get((found, ignores_merges))
    if name is None:
        shown = "\n".join(f"  {expression}" for expression in found)
        raise ModelError(
            "llama.cpp has no name that is known here for how this tokenizer splits a text"
            f"{', taking whole tokens first' if ignores_merges else ''}:\n{shown}\n"
            "  merge the model instead: llama.cpp's own converter may know the merged folder"
        )
    return name


def _expressions(step: Mapping[str, Any]) -> list[str]:
    """The expressions of a pre-tokenizer, in order; a step that is none stands as its own description."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            return [e for inner in steps for e in _expressions(inner)]
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": splits}:
            return [GPT_2] if splits else []
        case {"type": "Digits", "individual_digits": True}:
            return [DIGITS]
        case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
            return [str(expression)]
        # Whatever is not between matches is thrown away, which is nothing where every character matches.
        case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Removed", "invert": True}:
            return [str(expression)]
    return [str(dict(step))]
