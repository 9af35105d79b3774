"""Which libraries are here: installed, imported, known to work. Reads metadata only, and imports nothing.

Three things go wrong with libraries in a notebook. One is older than nbqlora needs. One was upgraded by pip
after this process had imported it: the process runs the old code, and loads files of the new one as it goes.
And Colab brings torchao 0.10, which makes peft refuse layers that are not in 4 bits: an unused library
breaks a run. A version newer than the tested one is no fault; it is only said.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import zip_longest

from nbqlora.core.doctor import Check


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known about one library.

    Args:
        floor: the oldest version that nbqlora takes, as in ``pyproject.toml``.
        tested: the version that the tests ran with, as in ``binder/constraints.txt``.
        module: its import name, where that differs.
    """

    floor: str
    tested: str
    module: str = ""


KNOWN: Mapping[str, Known] = {
    "torch": Known(floor="2.6", tested="2.13.0"),
    "transformers": Known(floor="5.15", tested="5.23.0"),
    "trl": Known(floor="1.15", tested="1.16.0"),
    "peft": Known(floor="0.19", tested="0.21.2"),
    "bitsandbytes": Known(floor="0.48", tested="0.50.2"),
    "accelerate": Known(floor="1.14", tested="1.15.0"),
    "datasets": Known(floor="4.7", tested="5.2.0"),
    "gguf": Known(floor="0.18", tested="0.19.0"),
    "ipython": Known(floor="7.34", tested="9.18.1", module="IPython"),
    "ipywidgets": Known(floor="7.7", tested="8.1.9"),
    "matplotlib": Known(floor="3.7", tested="3.11.2"),
    "nvidia-ml-py": Known(floor="12", tested="13.615.71", module="pynvml"),
    "psutil": Known(floor="5.9", tested="7.2.2"),
    "pyarrow": Known(floor="21", tested="26.0.1"),
    "safetensors": Known(floor="0.4.3", tested="0.8.0"),
    "tqdm": Known(floor="4.64", tested="4.70.1"),
}
# Named in the report's line; the others only when something is wrong with them.
MAIN = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
# May have been imported before an upgrade too: these come along with the above.
ALSO = ("nbqlora", "huggingface_hub", "tokenizers", "numpy", "pandas")
# peft 0.19 and later refuse an older torchao for every layer that is not quantized.
TORCHAO_FLOOR, PEFT_WITH_TORCHAO = "0.16", "0.19"


def installed_version(name: str) -> str:
    """The version on disk, "" when it is not installed."""
    try:
        return metadata.version(name) or ""
    except metadata.PackageNotFoundError:
        return ""


def loaded_version(module: str) -> str:
    """The version that this process has imported, "" when it has not (or the module does not say)."""
    return str(getattr(sys.modules.get(module), "__version__", None) or "")


def is_older(version: str, than: str) -> bool:
    """Whether the release ``version`` comes before ``than``; ``+cu128``, ``rc1`` and ``.dev0`` do not count."""
    pairs = list(zip_longest(_release(version), _release(than), fillvalue=0))
    return [a for a, _ in pairs] < [b for _, b in pairs]


def _release(version: str) -> list[int]:
    matched = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in matched.group().split(".")] if matched else []


def libraries_check() -> Check:
    """Every library that nbqlora stands on is there and not too old."""
    versions = {name: installed_version(name) for name in KNOWN}
    missing = [name for name, version in versions.items() if not version]
    older = [name for name, v in versions.items() if v and is_older(v, KNOWN[name].floor)]
    if missing or older:
        said = [f"{name} is not installed" for name in missing]
        said += [f"{name} {versions[name]} is older than {KNOWN[name].floor}" for name in older]
        wanted = " ".join(f'"{name}>={KNOWN[name].floor}"' for name in (*missing, *older))
        return Check(name="libraries", status="problem", found=", ".join(said), advice=f"pip install {wanted}")
    found = ", ".join(f"{name} {versions[name]}" for name in MAIN)
    newer = [name for name in MAIN if is_older(KNOWN[name].tested, versions[name])]
    if newer:
        tested = ", ".join(f"{name} {KNOWN[name].tested}" for name in newer)
        found += f" (tested up to {tested})"
    return Check(name="libraries", status="ok", found=found)


def restart_check() -> Check:
    """What this process has imported is what is installed now."""
    changed = []
    for name in (*KNOWN, *ALSO):
        known = KNOWN.get(name)
        loaded = loaded_version((known.module if known else "") or name)
        installed = installed_version(name)
        # torch's own version names its CUDA (2.11.0+cu128), the one that pip knows may not.
        if loaded and installed and (is_older(loaded, installed) or is_older(installed, loaded)):
            changed.append(f"{name} {loaded} is loaded, {installed} is installed")
    if changed:
        advice = "restart the kernel once (Colab: Runtime > Restart session); it then loads what is installed"
        return Check(name="restart", status="warning", found="; ".join(changed), advice=advice)
    return Check(name="restart", status="ok", found="not needed: what is loaded is what is installed")


def torchao_check(*, in_full_precision: bool) -> Check:
    """The torchao that Colab brings, and a peft that refuses it.

    Args:
        in_full_precision: the run puts LoRA on layers that are not in 4 bits (``load_in_4bit = false``, or
            ``lm_head`` or ``embed_tokens`` among the targets): those are what fails.
    """
    torchao, peft = installed_version("torchao"), installed_version("peft")
    if not torchao:
        return Check(name="torchao", status="ok", found="not installed, not needed")
    if not is_older(torchao, TORCHAO_FLOOR) or (peft and is_older(peft, PEFT_WITH_TORCHAO)):
        return Check(name="torchao", status="ok", found=torchao)
    found = (
        f"torchao {torchao} is older than {TORCHAO_FLOOR}: peft {peft} refuses LoRA on layers that are not in 4 bits "
        "(load_in_4bit = false, lm_head, embed_tokens)"
    )
    advice = "pip uninstall -y torchao: nothing here uses it"
    return Check(name="torchao", status="problem" if in_full_precision else "warning", found=found, advice=advice)
