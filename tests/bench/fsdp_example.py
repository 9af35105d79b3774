"""What splitting a QLoRA model over cards takes without nbqlora: FSDP2's own hooks on transformers', PEFT's and
bitsandbytes' modules.

As the libraries' examples have it: weights in bf16 storage, so that FSDP takes them; adapters in the same dtype;
``fully_shard`` on each decoder layer and on the whole, embeddings and head with it; gradient checkpointing on all
layers; the loss from all logits. Random tokens, all of them learned. FSDP copies bf16 through fp32 on a card, which
changes weights whose bytes are a NaN: memory and time are those of such a run, its losses are not looked at.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from tests.bench.sharded import Shape

RATE = 2e-4


def train(shape: Shape) -> dict[str, Any]:
    """One rank's part; figures as a run of ours has them."""
    from tests.bench.make_model import VOCAB
    from tests.bench.measured import card_name, wait

    device = _join()
    begun = time.time()
    model = _model(shape, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trains_at = time.time()
    numbers = torch.Generator().manual_seed(1 + dist.get_rank())
    seconds, losses = [], []
    for _ in range(shape.warmup + shape.steps):
        ids = torch.randint(3, VOCAB, (shape.bs, shape.seq), generator=numbers).to(device)
        wait()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    found = {
        "seconds": seconds, "losses": losses, "tokens": [shape.cards * shape.bs * shape.seq] * len(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_card else 0, "load_seconds": trains_at - begun,
        "trains_at": trains_at, "shards": dist.get_world_size(), "planned_bytes": 0, "planned_seconds": None,
        "policies": {"recompute": len(_layers(model))}, "card": card_name(),
    }  # fmt: skip
    dist.destroy_process_group()
    return found


def _join() -> torch.device:
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    card = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(card)
    dist.init_process_group("nccl")
    return torch.device("cuda", card)


def _model(shape: Shape, device: torch.device) -> Any:
    from peft import LoraConfig, get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    from tests.bench.stacks import DTYPES, LINEARS

    dtype = DTYPES[shape.dtype]
    model = AutoModelForCausalLM.from_pretrained(shape.model, device_map={"": "cpu"}, dtype=dtype)
    model.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=shape.r, lora_alpha=shape.r, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    _store_as(model, dtype, device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.train()


def _store_as(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """The packed bytes as plain parameters of another dtype: bitsandbytes puts what it needs around them again."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            state.to(device)
            module.quant_state, module.quant_storage = state, dtype
            module.compute_dtype, module.support_avx512bf16_for_cpu = dtype, False
            packed = module.weight.data.view(-1).view(dtype)[:, None]
            module.weight = torch.nn.Parameter(packed, requires_grad=False)


def _layers(model: Any) -> list[Any]:
    return list(model.get_base_model().model.layers)
