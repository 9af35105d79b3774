"""The chat templates of well-known families, each with a small tokenizer that has the family's special tokens.

What is learned of a conversation is written here by hand, family by family: ``{a}`` is what the answer says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.data.small_tokenizers import CORPUS

# Letters with what stands before them, digits by three, signs with the line breaks behind them, white space.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Args: last, earlier: what is learned of the last answer, and of those before; added: tokens not special."""

    last: str
    earlier: str = ""
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    bos: str | None = None
    eos: str
    strips: bool = False
    has_system: bool = True
    pieces: str = "bytes"

    def learned(self, answers: list[str], last_is_answer: bool = True) -> list[str]:
        """What the loss counts, answer by answer."""
        said = [a.strip() if self.strips else a for a in answers]
        patterns = [self.earlier or self.last] * len(said)
        if last_is_answer:
            patterns[-1] = self.last
        return [pattern.replace("{a}", a) for pattern, a in zip(patterns, said, strict=True)]


CHATML = ("<|im_start|>", "<|im_end|>")
NO_THOUGHT = "<think>\n\n</think>\n\n"
FAMILIES = {
    "qwen2_5": Family(
        last="{a}<|im_end|>",
        special=(*CHATML, "<|endoftext|>"),
        added=("<tool_call>", "</tool_call>"),
        eos="<|im_end|>",
    ),
    "qwen3": Family(
        last=NO_THOUGHT + "{a}<|im_end|>",
        earlier="{a}<|im_end|>",
        special=(*CHATML, "<|endoftext|>"),
        added=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
        eos="<|im_end|>",
    ),
    # Asked with "<think>\n": of the last answer its thought's end is learned, and no earlier one has any.
    "qwen3_thinking": Family(
        last="\n</think>\n\n{a}<|im_end|>",
        earlier="{a}<|im_end|>",
        special=CHATML,
        added=("<think>", "</think>"),
        eos="<|im_end|>",
    ),
    # The space before an answer is the answer's; a decoder of this kind drops it where a text begins.
    "llama2": Family(last="{a} </s>", special=("<s>", "</s>"), bos="<s>", eos="</s>", strips=True, pieces="llama"),
    "mistral_v3": Family(
        last="{a}</s>",
        special=(
            "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
        ),
        bos="<s>",
        eos="</s>",
        strips=True,
        pieces="metaspace",
    ),
    "llama3": Family(
        last="{a}<|eot_id|>",
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        strips=True,
    ),
    "gemma": Family(
        last="{a}<end_of_turn>",
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        added=("\n", "\n\n", "\n\n\n"),
        bos="<bos>",
        eos="<eos>",
        strips=True,
        has_system=False,
    ),
    # The template ends with <|endoftext|>, which nobody has to learn: <|end|> ends an answer.
    "phi3": Family(
        last="{a}<|end|>",
        special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
    ),
    "zephyr": Family(last="{a}</s>", special=("<s>", "</s>"), bos="<s>", eos="</s>"),
    "deepseek": Family(
        last="{a}<｜end▁of▁sentence｜>",
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        added=(
            "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>",
            "<｜tool▁output▁end｜>",
        ),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    "granite": Family(
        last="{a}<|end_of_text|>",
        special=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        eos="<|end_of_text|>",
    ),
    "command_r": Family(
        last="{a}<|END_OF_TURN_TOKEN|>",
        special=(
            "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
        ),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        strips=True,
    ),
    "command_r7b": Family(
        last="<|START_RESPONSE|>{a}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        special=(
            "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
        ),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "gpt_oss": Family(
        last="<|channel|>final<|message|>{a}<|return|>",
        earlier="<|channel|>final<|message|>{a}<|end|>",
        special=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"),
        eos="<|return|>",
    ),
}  # fmt: skip


@cache
def family_tokenizer(name: str) -> Any:
    """The family's small tokenizer, with its template."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    raw = _PIECES[family.pieces]()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    raw.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=(FOLDER / f"{name}.jinja").read_text(encoding="utf-8"),
    )


def _bytes() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return raw


def _with_byte_pieces() -> Any:
    """A BPE over "▁" for spaces, with a piece for each byte: what SentencePiece models become."""
    import json

    from tokenizers import Tokenizer, decoders, models, trainers

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    corpus = [text.replace(" ", "▁") for text in CORPUS]
    trained.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    return raw


def _llama() -> Any:
    """A space is put before every piece of text, also before one that follows a special token."""
    from tokenizers import normalizers

    raw = _with_byte_pieces()
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return raw


def _metaspace() -> Any:
    """A space is put before the whole text only."""
    from tokenizers import pre_tokenizers

    raw = _with_byte_pieces()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return raw


_PIECES: dict[str, Callable[[], Any]] = {"bytes": _bytes, "llama": _llama, "metaspace": _metaspace}
