"""Saving the adapter of a model of a real shape: seconds, by nbqlora's own way of saving.

    python tests/bench/save_adapter.py llama-8b FOLDER [--r 16] [--out FILE]

The adapter is real (LoRA on all linears, on the card where there is one), the base has shapes and no weights: saving
does not look at them. What is timed is what a run does at its end, adapter, tokenizer, checksums, fsync and the
exchange of the folder included; first into an empty folder, then over the last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from nbqlora.hub.save import save_adapter
from tests.bench.make_model import SHAPES, save_tokenizer


def main() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(asked.folder / "tokenizer")
    config = AutoConfig.for_model("llama", **SHAPES[asked.shape])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    lora = LoraConfig(r=asked.r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    on_card = torch.cuda.is_available()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, device="cuda" if on_card else "cpu")
                setattr(module, name, torch.nn.Parameter(values))
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    tokenizer = AutoTokenizer.from_pretrained(asked.folder / "tokenizer")
    seconds = []
    for _ in range(6):
        begun = time.monotonic()
        save_adapter(model, tokenizer, asked.folder / "run", "base")
        seconds.append(time.monotonic() - begun)
    line = {
        "shape": asked.shape, "r": asked.r, "n_bytes": n_bytes, "first_seconds": seconds[0],
        "median_seconds": statistics.median(seconds[1:]), "seconds": seconds, "torch": torch.__version__,
        "card": torch.cuda.get_device_name() if on_card else "CPU",
        "command": f"python tests/bench/save_adapter.py {asked.shape} FOLDER --r {asked.r}",
    }  # fmt: skip
    print(json.dumps(line))
    if asked.out:
        with asked.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
