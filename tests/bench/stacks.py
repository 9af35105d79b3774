"""The engines that ``tests/bench/engine.py`` measures: how each is loaded, and what one of its steps is."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tests.bench.make_model import VOCAB
from tests.bench.measured import Measured, allocated, begin_profile, device, end_profile, wait
from tests.bench.turns import my_turn
from tests.bench.users_path import finetune, limits

if TYPE_CHECKING:
    from tests.bench.engine import Workload

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RATE = 2e-4
# Token ids -> loss of one whole optimizer step.
Step = Callable[[torch.Tensor], torch.Tensor]
# Called when everything is imported: loading is timed from there.
Begin = Callable[[], None]


def measure(workload: Workload) -> Measured:
    """Run the workload."""
    return finetune(workload) if workload.stack == "finetune" else _steps(workload)


def _steps(workload: Workload) -> Measured:
    """Random tokens, all of them learned, a batch a step."""
    began: list[float] = []
    found = Measured()
    make = {"loop": partial(_loop, found=found), "hf": _hf, "liger": _liger, "unsloth": _unsloth}[workload.stack]
    step = make(workload, lambda: began.append(time.perf_counter()))
    wait()
    found.load_seconds = time.perf_counter() - began[0]
    my_turn(workload.turns, workload.of)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found.base_bytes = allocated()
    numbers = torch.Generator().manual_seed(1)

    def ids() -> torch.Tensor:
        return torch.randint(3, VOCAB, (workload.bs, workload.seq), generator=numbers).to(device())

    for _ in range(workload.warmup + workload.steps):
        batch = ids()
        wait()
        start = time.perf_counter()
        loss = step(batch)
        wait()
        found.seconds.append(time.perf_counter() - start)
        found.losses.append(float(loss))
    if torch.cuda.is_available():
        found.peak_bytes = torch.cuda.max_memory_allocated()
    if workload.profile:
        batch, profiler = ids(), begin_profile()
        step(batch)
        end_profile(profiler, found)
    return found


def _loop(workload: Workload, begin: Begin, *, found: Measured) -> Step:
    import nbqlora
    import nbqlora.run.loading

    begin()
    loaded = nbqlora.load(
        str(workload.model),
        max_length=workload.seq,
        per_device_train_batch_size=workload.bs,
        gradient_checkpointing=workload.policy,
        dtype=workload.dtype,
        lora_r=workload.r,
        lora_alpha=workload.r,
        lora_dropout=0.0,
        target_modules=LINEARS,
        **limits(workload),
    )
    found.plan = loaded.plan
    loaded.model.train()
    optimizer = loaded.optimizer(learning_rate=RATE, optim=workload.optim)
    return lambda ids: loaded.train_step(optimizer, input_ids=ids, labels=ids)


def _hf(workload: Workload, begin: Begin) -> Step:
    import bitsandbytes  # noqa: F401  (imported by loading otherwise)
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    begin()
    dtype = DTYPES[workload.dtype]
    model = AutoModelForCausalLM.from_pretrained(
        workload.model, device_map={"": device()}, dtype=dtype, attn_implementation="sdpa"
    )
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # the checkpoint's own otherwise
            module.compute_dtype = dtype
    model.requires_grad_(False)
    model.config.use_cache = False
    if workload.policy == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=workload.r, lora_alpha=workload.r, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.train()
    return _plain_step(model, workload)


def _liger(workload: Workload, begin: Begin) -> Step:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return _hf(workload, begin)


def _unsloth(workload: Workload, begin: Begin) -> Step:
    from unsloth import FastLanguageModel

    begin()
    length = max(2048, workload.seq)
    model, _ = FastLanguageModel.from_pretrained(
        str(workload.model), max_seq_length=length, dtype=DTYPES[workload.dtype], load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=workload.r,
        lora_alpha=workload.r,
        lora_dropout=0,
        bias="none",
        target_modules=LINEARS,
        use_gradient_checkpointing="unsloth" if workload.policy == "full" else False,
        max_seq_length=length,
    )
    FastLanguageModel.for_training(model)
    return _plain_step(model, workload)


def _plain_step(model: Any, workload: Workload) -> Step:
    """A peer's step: autocast, backward, optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if workload.optim == "adamw_8bit":
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=RATE)
    else:
        optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    dtype = DTYPES[workload.dtype]

    def step(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
