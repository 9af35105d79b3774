"""Bytes of tensors: each storage once."""

from __future__ import annotations

from pathlib import Path

import torch

from nbqlora.memory.tensors import storage_bytes, with_quantization
from tests import tiny


def test_views_and_ties_count_once() -> None:
    base = torch.zeros(100)
    other = torch.zeros(10, device="meta")
    assert storage_bytes([base, base[:50], base.view(10, 10), None, other], "cpu") == 400
    seen: set[int] = set()
    assert storage_bytes([base[:3]], "cpu", seen) == 400
    assert storage_bytes([base], "cpu", seen) == 0


def test_a_4_bit_weight_has_its_scales(tiny_folder: Path) -> None:
    model = tiny.load_nf4(tiny_folder)
    weight = model.model.layers[0].mlp.up_proj.weight
    (packed, *scales) = with_quantization([weight])
    assert packed is weight and scales
    n = 128 * tiny.D_MODEL
    # Half a byte each; of the scales the codes of 16 and 256 values count too, and bitsandbytes may pad.
    assert n / 2 + n / 64 <= storage_bytes(with_quantization([weight]), "cpu") <= n / 2 + n / 64 + 8192
