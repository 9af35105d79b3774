"""A checkpoint of a real model's shape with random weights, in NF4, so that speed is measured without a download.

    python tests/bench/make_model.py SHAPE[:LAYERS] FOLDER [--same-layers]

Speed and memory depend on shapes, not on values: seven linears a layer in 4 bits with double quantization, embeddings
and head in bf16, as ``transformers`` stores them. ``llama-8b:4`` is the 8B model with four layers; ``llama-tiny`` is
for trying the scripts on a CPU. The 16-bit weights stand beside FOLDER while it is made (16 GB for 8B).

With ``--same-layers`` one layer is made, and written as often as there are layers: a 70B model in the time that its 40
GB take to be written, of which 16-bit weights are those of one layer, embeddings and head.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# What Llama 3.1 and 3.2 have.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-3b": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "llama-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "llama-tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 4096, "tie_word_embeddings": False,
    },
}  # fmt: skip
# Entries of the tokenizer: ids below this are drawn as random tokens too.
VOCAB = 4000
# Of one file, where all layers are the same.
FILE_BYTES = 4 << 30
# What safetensors calls the dtypes that are written.
DTYPES = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}
SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>")
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"


def sentences(count: int, words: int, *, seed: int = 0) -> Iterator[str]:
    """Made-up text of so many words a line: each word is at least one token."""
    numbers = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el", "ir", "os", "um")]
    for _ in range(count):
        yield " ".join("".join(numbers.choices(syllables, k=numbers.choice((1, 1, 2, 2, 3)))) for _ in range(words))


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer learned from made-up text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(sentences(500, 60, seed=1), trainer)
    bos, eos, pad = SPECIAL
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def make_model(shape: str, folder: Path, *, same_layers: bool = False) -> None:
    """Write model and tokenizer.

    Args:
        shape: a key of ``SHAPES``, with ``:LAYERS`` to have fewer.
        same_layers: make one layer, and write it for all.
    """
    name, _, layers = shape.partition(":")
    dims = {**SHAPES[name], **({"num_hidden_layers": int(layers)} if layers else {})}
    folder.parent.mkdir(parents=True, exist_ok=True)
    if same_layers:
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            _save_model({**dims, "num_hidden_layers": 1}, Path(made) / "one")
            _repeat_layer(Path(made) / "one", folder, dims["num_hidden_layers"])
    else:
        _save_model(dims, folder)
    save_tokenizer(folder)


def _save_model(dims: dict[str, Any], folder: Path) -> None:
    """Random weights, quantized."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

    config = LlamaConfig(
        **dims, max_position_embeddings=131072, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, dtype="bfloat16",
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=folder.parent) as wide:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(wide, max_shard_size="4GB")
        del model
        torch.cuda.empty_cache()
        settings: dict[str, Any] = {"device_map": {"": device}, "dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(wide, quantization_config=nf4, **settings)
        model.save_pretrained(folder)


def _repeat_layer(one: Path, folder: Path, layers: int) -> None:
    """A model whose layers are all the one layer of another."""
    from safetensors.torch import load_file

    tensors = {name: t for file in one.glob("*.safetensors") for name, t in load_file(file).items()}
    first = "model.layers.0."
    rest = {name: t for name, t in tensors.items() if not name.startswith(first)}
    layer = {name.removeprefix(first): t for name, t in tensors.items() if name.startswith(first)}
    at_once = max(1, FILE_BYTES // sum(t.nbytes for t in layer.values()))
    files = [rest]
    for begin in range(0, layers, at_once):
        places = range(begin, min(begin + at_once, layers))
        files.append({f"model.layers.{place}.{name}": t for place in places for name, t in layer.items()})
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for number, contents in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write(contents, folder / file)
        index |= dict.fromkeys(contents, file)
    total = sum(t.nbytes for contents in files for t in contents.values())
    told = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told))
    config = json.loads((one / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    shutil.copy(one / "generation_config.json", folder)


def _write(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """A safetensors file; safetensors' own writer refuses tensors that are the same."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            out.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))


def main() -> None:
    """Make one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--same-layers", action="store_true", help="make one layer, and write it for all")
    parsed = parser.parse_args()
    start = time.perf_counter()
    make_model(parsed.shape, parsed.folder, same_layers=parsed.same_layers)
    print(f"made {parsed.shape} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
