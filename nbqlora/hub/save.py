"""An adapter on disk in PEFT's own format, and ``run.json`` beside it; each file whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbqlora.core.errors import OutOfDiskError
from nbqlora.core.plan import SavedAdapter
from nbqlora.core.units import format_bytes

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
    _check_room(model, folder)
    for config in model.peft_config.values():
        config.base_model_name_or_path = DEMO_ORIGIN if base_name == "demo" else base_name
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=output_dir))
    try:
        model.save_pretrained(temporary, save_embedding_layers=False)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(_card(model, base_name), encoding="utf-8")
        files = sorted((f for f in temporary.rglob("*") if f.is_file()), key=lambda f: f.name == WEIGHTS)
        n_bytes = sum(f.stat().st_size for f in files)
        digest = hashlib.sha256((temporary / WEIGHTS).read_bytes()).hexdigest()
        for file in files:
            _sync(file)
        for file in files:
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        _sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return SavedAdapter(path=str(folder), n_bytes=n_bytes, sha256=digest)


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


def save_json(value: Mapping[str, Any], path: Path) -> None:
    """Write JSON beside, sync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".saving-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _check_room(model: Any, folder: Path) -> None:
    needed = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) + (64 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutOfDiskError(
            f"saving the adapter needs {format_bytes(needed)} and {folder} has {format_bytes(free)} free; "
            "free some room, then call run.save()"
        )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
