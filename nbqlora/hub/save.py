"""An adapter on disk in PEFT's own format: a folder that is whole, and known to be.

All files of a save belong together: a config beside the weights of an earlier run is an adapter that loads and
answers wrong. So the folder is filled under a hidden name, synced, and changes places with the former one. What
somebody else put into that folder (notes, a page that was edited, a repository's ``.git``) is linked into the new
one, or copied where the file system has no links; what an earlier save wrote there is not, by its manifest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nbqlora.core.plan import SavedAdapter
from nbqlora.hub.atomic import HIDDEN, check_room, new_folder, recover_folder
from nbqlora.hub.manifest import MANIFEST, PAGE, WEIGHTS, read_manifest, write_manifest
from nbqlora.hub.refused import disk_errors
from nbqlora.hub.sealed import sha256

ADAPTER_FOLDER = "adapter"
DEMO_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
# For the tokenizer, whose vocabulary may have tens of MB, and so that an adapter does not take a disk's last block.
ROOM_BYTES = 64 << 20


def save_adapter(model: Any, tokenizer: Any, output_dir: Path, base_name: str) -> SavedAdapter:
    """Write adapter, tokenizer and manifest to ``output_dir/adapter``: all of them, or nothing is changed.

    Args:
        base_name: what ``adapter_config.json`` names as the base; the demo model's origin for ``"demo"``.

    Raises:
        OutOfDiskError: the disk has too little room.
        DiskError: the disk refused.
    """
    folder = output_dir / ADAPTER_FOLDER
    with disk_errors(f"the adapter cannot be saved in {folder}", _where_else(output_dir)):
        output_dir.mkdir(parents=True, exist_ok=True)
        check_room(output_dir, adapter_bytes(model) + ROOM_BYTES, "saving the adapter", _where_else(output_dir))
        recover_folder(folder)
        with new_folder(folder, replace=True) as new:
            write_adapter(model, new, base_name)
            tokenizer.save_pretrained(new)
            write_manifest(new, _base_of(base_name))
            n_bytes = sum(f.stat().st_size for f in new.rglob("*") if f.is_file())
            digest = sha256(new / WEIGHTS)
            keep_others(folder, new)
    return SavedAdapter(path=str(folder), n_bytes=n_bytes, sha256=digest)


def _where_else(output_dir: Path) -> str:
    """What to do when the adapter cannot be written."""
    advice = "free some room and run it again"
    # Named as in ``hub.checkpoint``, which builds on this module.
    kept = output_dir / "checkpoints"
    return f"{advice}; what was trained is in {kept}" if any(kept.glob("step-*")) else advice


def keep_others(folder: Path, new: Path) -> None:
    """Take what no save of ours wrote from the former folder into the new one."""
    if not folder.is_dir():
        return
    try:
        manifest = read_manifest(folder)
    except ValueError:
        manifest = None
    written = {MANIFEST, *(manifest.files if manifest else ())}
    own_page = manifest is not None and (folder / PAGE).is_file() and sha256(folder / PAGE) != manifest.page
    if own_page:
        (new / PAGE).unlink(missing_ok=True)
    for old in folder.iterdir():
        if old.name not in written and not old.name.startswith(HIDDEN) and not os.path.lexists(new / old.name):
            _carry(old, new / old.name)


def _carry(old: Path, new: Path) -> None:
    if old.is_symlink():
        new.symlink_to(os.readlink(old))
    elif old.is_dir():
        shutil.copytree(old, new, symlinks=True, copy_function=_link)
    else:
        _link(str(old), str(new))


def _link(old: str, new: str) -> None:
    try:
        os.link(old, new)
    except OSError:  # without links, or not for this file: a copy says what else is wrong
        shutil.copy2(old, new)


def write_adapter(model: Any, folder: Path, base_name: str) -> None:
    """PEFT's two files and a page about them, written to ``folder`` as they are."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = _base_of(base_name)
    with _without_card(model):
        model.save_pretrained(folder, state_dict=_on_host(model), save_embedding_layers=False)
    (folder / PAGE).write_text(_card(model, base_name), encoding="utf-8")


def _on_host(model: Any) -> dict[str, torch.Tensor]:
    """What an adapter is made of, copied. PEFT would clone views of one buffer where they are: on a full card."""
    own = ((name, p) for name, p in model.named_parameters() if p.requires_grad or "lora_" in name)
    return {name: p.detach().to("cpu", copy=True) for name, p in own}


@contextmanager
def _without_card(model: Any) -> Iterator[None]:
    """PEFT makes a page for each save, of which nothing would stay: 50 ms, more than the rest of a small checkpoint."""
    model.create_or_update_model_card = lambda folder: None
    try:
        yield
    finally:
        del model.create_or_update_model_card


def adapter_bytes(model: Any) -> int:
    """Bytes of the trained parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _base_of(base_name: str) -> str:
    return DEMO_ORIGIN if base_name == "demo" else base_name


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
