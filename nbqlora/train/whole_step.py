"""An optimizer's step that is whole or not begun: the memory that it takes is there before it begins.

torch's AdamW and bitsandbytes' make their states in the first step, parameter by parameter: memory that runs out
between two of them leaves some stepped and some not. So the states are made before, as they would have made them.
torch's fused AdamW and the 8-bit one allocate nothing after that. The plain one makes temporary tensors as large as its
largest parameter; just before each of its steps so much is taken and let go, and lies in the card's cache when it is
asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch

# Tensors of a parameter's size that exist at once in a step of torch's plain AdamW.
TEMPORARIES = 3
# What a loss scale hands to the optimizer for one step, multiplied with what it finds there.
HANDED = ("grad_scale", "found_inf")


def make_states(optimizer: Any) -> None:
    """Make the states that are not there yet; those of a step that was never taken.

    Each parameter's is there in whole or not at all, so that this can be done again.
    """
    make = _torch_state if isinstance(optimizer, torch.optim.AdamW) else _bitsandbytes_state
    for i, group in enumerate(optimizer.param_groups):
        for k, parameter in enumerate(group["params"]):
            if not optimizer.state.get(parameter):
                make(optimizer, group, parameter, i, k)


def keep_whole(wrapped: Any, once: Callable[..., Any]) -> None:
    """Change accelerate's optimizer on the instance: a step that runs out of memory is tried again, if it can be.

    Args:
        once: does work until it fits, and is told how to know that a failure left everything as it was.
    """
    inner, own = wrapped.optimizer, wrapped.step
    begun: list[bool] = []
    # The last of its hooks: what comes next is the update itself.
    inner.register_step_pre_hook(lambda *_: begun.append(True))

    def attempt(left: dict[str, Any], *args: Any) -> Any:
        for name in HANDED:
            vars(inner).pop(name, None)
        vars(inner).update(left)
        _make_room(inner)
        return own(*args)

    @wraps(own)  # a schedule looks for a mark of its own on it
    def step(*args: Any) -> Any:
        begun.clear()
        left = {name: value for name, value in vars(inner).items() if name in HANDED}
        return once(partial(attempt, left, *args), is_whole=lambda: not begun)

    wrapped.step = step


def _torch_state(optimizer: Any, group: dict[str, Any], parameter: torch.Tensor, i: int, k: int) -> None:
    device = parameter.device if group["fused"] or group["capturable"] else torch.device("cpu")
    optimizer.state[parameter] = {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def _bitsandbytes_state(optimizer: Any, group: dict[str, Any], parameter: torch.Tensor, i: int, k: int) -> None:
    if not optimizer.initialized:
        optimizer.check_overrides()
    try:
        optimizer.init_state(group, parameter, i, k)
    except BaseException:
        optimizer.state.pop(parameter, None)
        raise


def _make_room(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    if not isinstance(optimizer, torch.optim.AdamW) or group["fused"]:
        return
    largest = max((p for g in optimizer.param_groups for p in g["params"]), key=lambda p: p.nbytes)
    if largest.device.type == "cuda":
        taken = [torch.empty_like(largest) for _ in range(TEMPORARIES)]
        del taken
