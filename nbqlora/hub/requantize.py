"""A published checkpoint's weights in NF4 once more, as loading made them: the same bits, without loading the model."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from nbqlora.core.errors import ModelError
from nbqlora.hub.base_weights import BLOCK, NESTED
from nbqlora.hub.stored import StoredTensors
from nbqlora.kernels.nf4 import Nf4
from nbqlora.memory.allowance import Workspace


class Requantizer:
    """Makes the 4-bit weights again from the published ones, a few rows at a time.

    Blocks are independent, so rows can be packed in turn; only their scales are needed together, for these are
    quantized once more around their common mean. Packed weight and scales, 0.56 bytes an element, are the one buffer
    that grows with a tensor.

    Args:
        linears: names of the weights that are in 4 bits.
        dtype: that the weights were cast to before they were packed.
        piece_bytes: fp32 bytes of the rows that are packed at once.
    """

    def __init__(
        self,
        stored: StoredTensors,
        linears: frozenset[str],
        *,
        dtype: torch.dtype,
        device: torch.device,
        workspace: Workspace,
        piece_bytes: int,
    ) -> None:
        self._stored, self._linears, self._dtype, self._device = stored, linears, dtype, device
        self._workspace, self._piece_bytes = workspace, piece_bytes
        self._buffers: list[torch.Tensor] = []

    def __call__(self, name: str) -> Nf4 | None:
        """The weight in 4 bits, or None for one that is not quantized."""
        if name not in self._linears:
            return None
        from bitsandbytes.functional import quantize_4bit, quantize_blockwise

        n_rows, n_cols = self._stored[name].shape
        if n_rows * n_cols % BLOCK:
            return self._at_once(name)
        unit = BLOCK // math.gcd(n_cols, BLOCK)
        step = max(1, self._piece_bytes // (4 * n_cols) // unit) * unit
        packed = self._workspace.empty(n_rows * n_cols // 2, torch.uint8)
        absmax = self._workspace.empty(n_rows * n_cols // BLOCK, torch.float32)
        self._buffers = [packed, absmax]
        code = torch.empty(0)
        for first in range(0, n_rows, step):
            rows = self._stored[name].read(first, first + step).to(self._device, self._dtype)
            part, state = quantize_4bit(rows, quant_type="nf4", compress_statistics=False, blocksize=BLOCK)
            begin = first * n_cols
            packed[begin // 2 : begin // 2 + part.numel()] = part.view(-1).cpu()
            absmax[begin // BLOCK : begin // BLOCK + state.absmax.numel()] = state.absmax.cpu()
            code = state.code.cpu()
        # Where loading does it: a sum of many numbers depends on their order, and a card's order is another.
        scales = absmax.to(self._device)
        offset = scales.mean()
        nested, outer = quantize_blockwise(scales.sub_(offset), blocksize=NESTED)
        return Nf4(packed=packed, absmax=nested.view(-1).cpu(), code=code, n_rows=n_rows, n_cols=n_cols,
                   nested_absmax=outer.absmax.cpu(), nested_code=outer.code.cpu(), offset=offset.cpu())  # fmt: skip

    def _at_once(self, name: str) -> Nf4:
        """A weight that is not whole blocks: small and rare, so packed in one piece."""
        from bitsandbytes.functional import quantize_4bit

        values = self._stored[name].read().to(self._device, self._dtype)
        packed, state = quantize_4bit(values, quant_type="nf4", compress_statistics=True, blocksize=BLOCK)
        return Nf4(packed=packed.view(-1), absmax=state.absmax, code=state.code, n_rows=values.shape[0],
                   n_cols=values.shape[1], nested_absmax=state.state2.absmax, nested_code=state.state2.code,
                   offset=state.offset, nested_blocksize=state.state2.blocksize)  # fmt: skip

    def give_back(self, weight: Nf4) -> None:
        """Its buffers are free again."""
        for buffer in self._buffers:
            self._workspace.give_back(buffer)
        self._buffers = []


def quantized_linears(folder: Path, *, trust_remote_code: bool = False) -> frozenset[str]:
    """Paths of the linears that are in 4 bits once a model is loaded in NF4, as transformers decides it.

    Raises:
        ModelError: transformers does not know the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"cannot read the config of {folder}: {str(error).splitlines()[0]}") from error
    quantizer = AutoHfQuantizer.from_config(
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), pre_quantized=False
    )
    quantizer.preprocess_model(model=model, dtype=torch.float32, device_map={"": "cpu"})
    return frozenset(path for path, module in model.named_modules() if type(module).__name__ == "Linear4bit")
