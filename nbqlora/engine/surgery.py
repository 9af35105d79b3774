"""Changes to a loaded model that every run needs, each made to instances and listed."""

from __future__ import annotations

import torch

from nbqlora.core.plan import Replacement


def keep_linears_trainable(model: torch.nn.Module) -> tuple[Replacement, ...]:
    """On a CPU, keep 4-bit linears in the format that has a backward.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight at its first use in eval mode, for an
    operator that has no gradient. Any evaluation before or during training then cuts the gradient at every
    frozen linear, and training goes on with wrong ones: the demo learned the labels of its style and
    nothing else. The switch is an attribute of each module; it is turned off.
    """
    from bitsandbytes.nn import Linear4bit

    switched = 0
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            switched += bool(getattr(module, "support_avx512bf16_for_cpu", False))
            module.support_avx512bf16_for_cpu = False
    if not switched:
        return ()
    because = "bitsandbytes' CPU inference format, entered at the first evaluation, has no gradient"
    return (Replacement(path=f"{switched} 4-bit linears", old="repacked in eval mode", new="kept", because=because),)
