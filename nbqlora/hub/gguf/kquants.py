"""K-quants: a 16-bit GGUF first, then llama.cpp's quantizer on it.

The file in between keeps the 16 bits of the base: fp16 where the base is fp16, else bf16, which no weight is too large
for. What it rounds is far below what 4 to 6 bits round (bf16 at most 0.2 % of a weight). fp8 or Q8_0 in between would
save disk and round twice.

Disk: 2 bytes a weight beside the result, in ``temporary_location`` if that is elsewhere. Memory: llama.cpp takes the
file in between tensor by tensor, each as fp32 while it is quantized: 2 GiB for a head of 128k x 4096.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nbqlora.core.errors import ModelError, NbqloraError
from nbqlora.hub.gguf.file import full_disk
from nbqlora.hub.gguf.quantizations import K_BLOCK, K_FALLBACK_BITS, K_QUANTS
from nbqlora.hub.gguf.tensors import Tensor
from nbqlora.hub.weights import WeightStream

PACKAGE = "cyllama"
_SCRIPT = Path(__file__).with_name("quantizer.py")
_LOOK_SECONDS = 0.2
# A disk with less than this left when the quantizer failed was full.
_FULL_BYTES = 1 << 20


def check_quantizer() -> None:
    """Raise :class:`ModelError` when llama.cpp's quantizer is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ModelError(
            'K-quants are made by llama.cpp\'s quantizer, which is not installed: pip install "nbqlora[gguf]"\n'
            "  Q8_0, Q5_1, Q5_0, Q4_1 and Q4_0 need nothing more"
        )


def file_between(weights: WeightStream) -> str:
    """The quantization of the file in between."""
    stored = {weights.dtype(name) for name in weights.names}
    return "F16" if stored == {torch.float16} else "BF16"


def expected_bytes(tensors: Sequence[Tensor], quantization: str) -> int:
    """About how large the result becomes; rather more than less."""
    n_bits = 0.0
    for tensor in tensors:
        n_weights = 1
        for size in tensor.shape:
            n_weights *= size
        fits = tensor.shape[-1] % K_BLOCK == 0
        layers = K_QUANTS[quantization] if fits else K_FALLBACK_BITS
        is_table = not tensor.name.startswith("blk.")
        n_bits += n_weights * (32 if len(tensor.shape) == 1 else max(layers, K_QUANTS["Q6_K"]) if is_table else layers)
    return int(n_bits / 8)


def quantize(source: Path, target: Path, quantization: str, told: Callable[[int], None]) -> None:
    """Run llama.cpp's quantizer.

    Args:
        told: called a few times a second with the bytes written so far.

    Raises:
        ModelError: the quantizer refused or ended early; its last line is in the message.
        OutOfDiskError: the disk became full.
    """
    from gguf import LlamaFileType

    ftype = int(LlamaFileType[f"MOSTLY_{quantization}"])
    # -P: the script's folder, with names such as file.py, must not be searched for imports.
    command = [sys.executable, "-P", str(_SCRIPT), str(source), str(target), str(ftype), str(os.cpu_count() or 1)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, errors="replace") as process:
        try:
            said = _wait(process, target, told)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise _failure(target, quantization, process.returncode, said)


def _wait(process: subprocess.Popen[str], target: Path, told: Callable[[int], None]) -> str:
    """Wait for the end, telling sizes; returns the last line on stderr."""
    while True:
        try:
            _, said = process.communicate(timeout=_LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            told(target.stat().st_size)
        else:
            lines = [line.strip() for line in said.splitlines() if line.strip()]
            return lines[-1] if lines else ""


def _failure(target: Path, quantization: str, code: int, said: str) -> NbqloraError:
    written = target.stat().st_size
    if shutil.disk_usage(target.parent).free < _FULL_BYTES:
        return full_disk(target.parent, written)
    return ModelError(f"llama.cpp's quantizer could not make {quantization} (exit {code}): {said[:300] or 'no reason'}")


def type_counts(path: Path) -> dict[str, int]:
    """How many tensors of a file have which type."""
    from gguf import GGUFReader

    return dict(sorted(Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors).items()))


def fallback_notes(tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """Said when K-quants do not fit all matrices."""
    unfit = [t for t in tensors if len(t.shape) > 1 and t.shape[-1] % K_BLOCK]
    if not unfit:
        return ()
    what = f"{len(unfit)} matrices, such as {unfit[0].name}, have rows that are no multiple of {K_BLOCK}"
    return (f"{what}: llama.cpp stores them in other types, with more bits",)
