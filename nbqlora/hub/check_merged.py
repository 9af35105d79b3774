"""Does a merged model say what base and adapter say together? Asked layer by layer, so that any size can be asked.

Two models run the same few prompts, neither of which is ever loaded: the merged files through transformers' own
classes, and base with adapter through PEFT's. Both stand on the meta device; a module gets its weights when it is
called and loses them behind it, so the most that is held is one linear in fp32. The embedding is cut to the tokens
that occur, and the head is multiplied a few rows at a time.

All arithmetic is fp32, so what differs is what merging rounded. A wrong scale, a lost layer or mixed-up names show as
more than that; what it takes to be seen was measured (``core.merged.AGREES``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nbqlora.core.merged import MergeCheck
from nbqlora.engine.quiet import quiet_libraries
from nbqlora.hub.lora_files import WEIGHTS as ADAPTER_WEIGHTS
from nbqlora.hub.lora_files import AdapterFiles
from nbqlora.hub.merged import MergedModel, name_of_each
from nbqlora.hub.stored import StoredTensors
from nbqlora.hub.streamed import Tensor, Weights, fill_buffers, streamed

# Cut to the same number of tokens, so that they run together and each weight is read once.
MOST_TOKENS = 24
PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. The river that runs through",
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b\n\n\ndef multiply(a, b):",
    "Question: Why is the sky blue in the day and dark at night?\nAnswer: During the day, the light of",
)


def check_merged(
    merged: MergedModel,
    base: MergedModel,
    model: MergedModel,
    adapters: Sequence[AdapterFiles],
    ids: Sequence[Sequence[int]],
    *,
    trust_remote_code: bool = False,
) -> MergeCheck:
    """Compare logits of the merged files with those of base and adapter.

    Args:
        merged: what was written, as a model without adapters.
        base: the base alone.
        model: base and adapter merged in fp32, for the head's rows.
        adapters: as they were merged.
        ids: token ids of the prompts.

    Returns:
        The largest difference, what it is to be measured by, and how often the next token is the same.
    """
    n = min(MOST_TOKENS, *map(len, ids))
    vocabulary = sorted({token for row in ids for token in row[:n]})
    compact = torch.tensor([[vocabulary.index(token) for token in row[:n]] for row in ids])
    with quiet_libraries():
        plain = _decoder(merged.folder, (), trust_remote_code)
        adapted = _decoder(model.folder, adapters, trust_remote_code)
        ours = _hidden(plain, _of_model(merged, plain), vocabulary, compact)
        theirs = _hidden(adapted, _of_adapters(base, adapters, adapted), vocabulary, compact)
    return _compared(_head_rows(merged, model), ours, theirs)


def _decoder(folder: Path, adapters: Sequence[AdapterFiles], trust_remote_code: bool) -> Any:
    """The model on the meta device, its buffers real. Raises :class:`ModelError` as :func:`fill_buffers`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, dtype=torch.float32, attn_implementation="eager"
        )
    fill_buffers(model)
    if not adapters:
        return model.eval()
    configs = [LoraConfig.from_pretrained(str(a.folder)) for a in adapters]
    for each in configs:
        each.base_model_name_or_path = None  # PEFT would warn that the base has another name here
    wrapped = get_peft_model(model, configs[0], adapter_name="a0", low_cpu_mem_usage=True)
    for i, each in enumerate(configs[1:], start=1):
        wrapped.add_adapter(f"a{i}", each, low_cpu_mem_usage=True)
    wrapped.base_model.set_adapter([f"a{i}" for i in range(len(adapters))], inference_mode=True)
    return wrapped.base_model.model.eval()


def _of_model(weights: MergedModel, model: Any) -> Weights:
    """Weights of files by the parameter's path."""
    names = _names(model, weights.names)

    def read(path: str, rows: Sequence[int] | None) -> Tensor:
        name = names[_plain(path)]
        return weights.whole(name) if rows is None else weights.some_rows(name, rows)

    return read


def _names(model: Any, there: Sequence[str]) -> dict[str, str]:
    head = _prefix_of(model, model.get_output_embeddings())
    paths = {_plain(p) for p, _ in model.named_parameters() if not _is_adapters(p)}
    return name_of_each(tuple(p for p in paths if not p.startswith(f"{head}.")), there)


def _of_adapters(base: MergedModel, adapters: Sequence[AdapterFiles], model: Any) -> Weights:
    """Weights of base and adapters by the parameter's path, as PEFT lays them out."""
    files = [StoredTensors([a.folder / ADAPTER_WEIGHTS]) for a in adapters]
    read_base = _of_model(base, model)

    def read(path: str, rows: Sequence[int] | None) -> Tensor:
        if not _is_adapters(path):
            whole = [a.replaced[_plain(path)] for a in adapters if _plain(path) in a.replaced]
            if not whole or ".original_module." in path:
                return read_base(path, rows)
            value = whole[0].read().float()  # a bias that was trained has no wrapper
        else:
            found = re.search(r"\.a(\d+)(\.|$)", path)
            assert found is not None
            name = path.replace(f".a{found[1]}", "", 1).replace(".modules_to_save", "")
            key, stored = f"base_model.model.{name}", files[int(found[1])]
            value = stored[key if key in stored else key.removesuffix(".weight")].read().float()
            if ".lora_embedding_" in path:  # A is [r, vocab], B does not know the vocabulary
                return value[:, rows] if ".lora_embedding_A." in path else value
        return value if rows is None else value[rows]

    return read


def _is_adapters(path: str) -> bool:
    return ".lora_" in path or ".modules_to_save." in path


def _plain(path: str) -> str:
    return path.replace(".base_layer.", ".").replace(".original_module.", ".")


def _hidden(model: Any, weights: Weights, vocabulary: Sequence[int], compact: Tensor) -> Tensor:
    """What the head is given, ``[tokens, d_model]``."""
    embedding = _prefix_of(model, model.get_input_embeddings())
    decoder = model.get_decoder()
    for module in model.get_input_embeddings().modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # it counts in the whole vocabulary, and matters to gradients only
    with torch.no_grad(), streamed(decoder, _prefix_of(model, decoder), embedding, weights, vocabulary):
        hidden: Tensor = decoder(input_ids=compact, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).float()


def _prefix_of(model: Any, module: Any) -> str:
    return next(path for path, each in model.named_modules() if each is module)


def _head_rows(merged: MergedModel, model: MergedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of both heads, the merged one's and the other's in fp32."""
    head = "lm_head.weight"
    name = next((n for n in merged.names if n == head or n.endswith(f".{head}")), None)
    if name is None:  # tied
        name = next(n for n in merged.names if n.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")))
    yield from _in_step(merged.pieces(name), model.pieces(name))


def _in_step(ours: Iterator[Tensor], theirs: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """As many rows of both; a base in 4 bits comes in other steps."""
    left: list[Tensor] = [torch.empty(0), torch.empty(0)]
    for i, stream in enumerate((ours, theirs)):
        left[i] = next(stream)
    while True:
        n = min(map(len, left))
        yield left[0][:n], left[1][:n]
        for i, stream in enumerate((ours, theirs)):
            left[i] = left[i][n:]
            if not len(left[i]):
                more = next(stream, None)
                if more is None:
                    return
                left[i] = more


def _compared(heads: Iterator[tuple[Tensor, Tensor]], one: Tensor, other: Tensor) -> MergeCheck:
    n = len(one)
    best = [torch.full((n,), -torch.inf) for _ in range(2)]
    token = [torch.zeros(n, dtype=torch.long) for _ in range(2)]
    largest, total, squares, count, first = 0.0, 0.0, 0.0, 0, 0
    for rows in heads:
        logits = [hidden @ w.T for hidden, w in zip((one, other), rows, strict=True)]
        largest = max(largest, float((logits[0] - logits[1]).abs().max()))
        total += float(logits[1].double().sum())
        squares += float(logits[1].double().square().sum())
        count += logits[1].numel()
        for i, each in enumerate(logits):
            value, at = each.max(dim=1)
            better = value > best[i]
            best[i] = torch.where(better, value, best[i])
            token[i] = torch.where(better, at + first, token[i])
        first += rows[0].shape[0]
    spread = max(0.0, squares / count - (total / count) ** 2) ** 0.5
    return MergeCheck(n_tokens=n, n_same=int((token[0] == token[1]).sum()), largest_difference=largest, spread=spread)
