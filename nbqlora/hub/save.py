"""An adapter on disk in PEFT's own format; each file whole or not there at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from nbqlora.core.plan import SavedAdapter
from nbqlora.hub.atomic import check_room, hidden_beside, sync

ADAPTER_FOLDER = "adapter"
WEIGHTS = "adapter_model.safetensors"
DEMO_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"


def save_adapter(model: Any, tokenizer: Any, output_dir: Path, base_name: str) -> SavedAdapter:
    """Write adapter and tokenizer to ``output_dir/adapter``.

    Written to a folder beside, synced, then renamed file by file, the weights last: a crash leaves the
    former adapter or the new one.

    Args:
        base_name: what ``adapter_config.json`` names as the base; the demo model's origin for ``"demo"``.

    Raises:
        OutOfDiskError: the disk has too little room; nothing was touched.
    """
    folder = output_dir / ADAPTER_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    needed = adapter_bytes(model) + (64 << 20)
    check_room(folder, needed, "saving the adapter", "free some room and run it again")
    temporary = hidden_beside(folder)
    try:
        write_adapter(model, temporary, base_name)
        tokenizer.save_pretrained(temporary)
        files = sorted((f for f in temporary.rglob("*") if f.is_file()), key=lambda f: f.name == WEIGHTS)
        n_bytes = sum(f.stat().st_size for f in files)
        digest = sha256(temporary / WEIGHTS)
        for file in files:
            sync(file)
        for file in files:
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return SavedAdapter(path=str(folder), n_bytes=n_bytes, sha256=digest)


def write_adapter(model: Any, folder: Path, base_name: str) -> None:
    """PEFT's two files and a page about them, written to ``folder`` as they are."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = DEMO_ORIGIN if base_name == "demo" else base_name
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").write_text(_card(model, base_name), encoding="utf-8")


def adapter_bytes(model: Any) -> int:
    """Bytes of the trained parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def sha256(file: Path) -> str:
    """A file's digest, read in pieces."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _card(model: Any, base_name: str) -> str:
    """The adapter's page: what it is and how to load it, in place of PEFT's form with the base's local path."""
    config = next(iter(model.peft_config.values()))
    base = config.base_model_name_or_path
    known = f"base_model: {base}\n" if not Path(base).exists() and base.count("/") == 1 else ""
    return f"""---
{known}library_name: peft
tags: [lora, qlora, nbqlora]
---
A LoRA adapter (rank {config.r}, alpha {config.lora_alpha:g}) for {base_name if base_name != "demo" else base}, trained
with nbqlora.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "this folder")
```
"""
