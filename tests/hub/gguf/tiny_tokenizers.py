"""Small tokenizers of every kind, learned from nasty texts so that their merges reach across every boundary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbqlora.hub.gguf import splits

TEXTS = [
    "Hello world",
    " Hello  world ",
    "  two spaces, then   three    four",
    "\n\n\nthree lines\n\n  indented\n\ttab\t\ttabs\r\nwindows\r\n\r\n",
    "I'm you're HE'LL it's they'd we've 'tis 'S",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 ２３ ٣٤ ½ Ⅷ",
    "你好，世界！日本語のテキスト。한국어 텍스트입니다",
    "🎉 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301te\u0301 naïve café Straße",
    "Привет мир! Ελληνικά γειά σου עברית العربية हिन्दी ไทย",
    "def f(x):\n    return x**2 + 1  # comment\n\n\nclass A:\n\tpass\n",
    '{"key": [1, 2.5e-3, null], "a/b": "c\\\\d"} <html>&amp;</html> https://x.org/?q=1&r=2#top',
    "CamelCase HTTPServer snake_case kebab-case ALLCAPS iPhone XMLHttpRequest2",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c <|im_end|><|im_end|>",
    "... !!! ??? --- ___ *** ((())) [[]] {{}} \"quoted\" 'single' `code` ~tilde ^caret |pipe",
    "\u00a0no-break\u2003em space\u200bzero width\ufeffbom \u2028 separator",
    "trailing spaces   \n   leading   \n",
    " ",
    "\n",
    "   \n   \n",
    "x",
    "",
]
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def byte_level(folder: Path, expressions: Sequence[str], *, ignore_merges: bool = False, **config: Any) -> Path:
    """A byte-level BPE that splits by these expressions; saved.

    It is learned without splitting, so that merges would join across every place where a text is split; and it has
    tokens for some words that no merges join to, which are found only where whole tokens are taken first.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        max_token_length=6,
        show_progress=False,
    )
    learned.train_from_iterator(TEXTS * 3, trainer)
    raw = json.loads(learned.to_str())
    for word in ("ĠHTTPServer", "ĠCamelCase", "separator", "123", "Ġ123"):
        raw["model"]["vocab"].setdefault(word, len(raw["model"]["vocab"]))
    raw["model"]["ignore_merges"] = ignore_merges
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if expression == splits.DIGITS
        else pre_tokenizers.Split(Regex(expression), "isolated")
        for expression in expressions
        if expression != splits.GPT_2
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits.GPT_2 in expressions))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return _save(tokenizer, folder, **config)


def pieces(folder: Path, scheme: str = "always", *, normalizer: bool = False, **config: Any) -> Path:
    """A BPE with byte fallback whose merges come from scores, as SentencePiece's do."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    plain = [text for text in TEXTS if "<|" not in text and "👩" not in text]
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, max_token_length=8)
    learned.train_from_iterator(plain * 3, trainer)
    order = sorted(learned.get_vocab(), key=learned.get_vocab().__getitem__)
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *order]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_all_merges(order), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    escape = normalizers.Replace(" ", "▁")
    if normalizer:
        before = [normalizers.Prepend("▁")] if scheme == "always" else []
        tokenizer.normalizer = normalizers.Sequence([*before, escape])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return _save(tokenizer, folder, **config)


def _all_merges(order: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair of tokens that joins to a token, by the token's rank."""
    known = set(order)
    return [
        (token[:cut], token[cut:])
        for token in order
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def _save(tokenizer: Any, folder: Path, *, bos: bool = False, template: str | None = None, **config: Any) -> Path:
    from tokenizers import processors

    if bos:
        number = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False, "chat_template": template, **config,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def model_with(folder: Path, family: str = "llama", *, rows: int | None = None) -> Path:
    """Put a small model beside the tokenizer in a folder; its embedding has a row for each token, or ``rows``."""
    from transformers import AutoTokenizer

    from tests.tiny import make_model

    size = rows or len(AutoTokenizer.from_pretrained(folder))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    make_model(family, vocab_size=size, num_hidden_layers=1, **ids).save_pretrained(folder)
    return folder
