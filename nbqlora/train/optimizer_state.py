"""An optimizer's state: taken out by parameter, put back one tensor after the other.

``load_state_dict`` wants all of the state in the host's memory before anything moves, and bitsandbytes' makes a deep
copy of it first. Here each tensor is asked for, moved to where the optimizer keeps it, and let go; where it comes from
a file, the state is once on the device and one tensor of it in the host's memory.

All adapters may lie in one buffer that the optimizer steps as a single parameter, on one card and not on another (a
layer that cannot be replaced there), so the buffer's state is kept by the parameters that lie in it: it fits any way to
lay them out. Only a state that mixes neighbours, 8 bits with one scale for a block, has to find the layout that it had.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nbqlora.core.errors import TrainingError

Tensors = Mapping[str, torch.Tensor]
Values = Mapping[str, Any]
# A tensor laid out as a buffer -> its pieces by parameter, as views.
Part = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
Parts = Mapping[torch.Tensor, Part]
NO_PARTS: Parts = {}
# What torch's schedules keep for each group.
PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas")


def optimizer_state(
    optimizer: Any, names: Mapping[torch.Tensor, str], parts: Parts = NO_PARTS
) -> tuple[dict[str, torch.Tensor], Values]:
    """The optimizer's tensors as ``<parameter>:<key>``, on the CPU, and what else it holds.

    A tensor that several parameters share (bitsandbytes' quantization maps) is taken once.

    Args:
        names: the name of each parameter.
        parts: of the buffers among them.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    shared: dict[str, str] = {}
    layout: dict[str, str] = {}
    first_of: dict[tuple[int, int], str] = {}
    for parameter, state in optimizer.state.items():
        part = parts.get(parameter)
        if part is not None and _can_be_parted(parameter, state):
            tensors |= _parted(state, part(parameter.data), part)
            continue
        if part is not None:
            layout[names[parameter]] = _layout(part(parameter.data))
        for key, value in state.items():
            name = f"{names[parameter]}:{key}"
            if not isinstance(value, torch.Tensor):
                plain.setdefault(names[parameter], {})[key] = value
                continue
            first = first_of.setdefault((value.data_ptr(), value.nbytes), name)
            if first == name:
                tensors[name] = value.detach().cpu()
            else:
                shared[name] = first
    rates = [{k: g[k] for k in ("lr", "initial_lr") if k in g} for g in optimizer.param_groups]
    return tensors, {"plain": plain, "shared": shared, "layout": layout, "rates": rates}


def set_optimizer_state(
    optimizer: Any, names: Mapping[torch.Tensor, str], tensors: Tensors, values: Values, parts: Parts = NO_PARTS
) -> None:
    """Undo of :func:`optimizer_state` on a new optimizer of the same parameters.

    Args:
        tensors: each is asked for once.

    Raises:
        TrainingError: the state is of other parameters, or of a layout that is not this one.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    owner = {names[p]: p for p in groups}
    held = {name: buffer for buffer, part in parts.items() for name in part(buffer.data)}
    _check_names(tensors, values, owner, held)
    _check_layouts(values["layout"], {names[b]: _layout(part(b.data)) for b, part in parts.items()})
    rates = _for_each(values["rates"], len(optimizer.param_groups))
    for group, of_group in zip(optimizer.param_groups, rates, strict=True):
        group.update(of_group)
    for name, state in values["plain"].items():
        optimizer.state[owner[name]].update(state)
    views: dict[tuple[torch.Tensor, str], Tensors] = {}

    def put(full: str, value: torch.Tensor) -> None:
        name, key = full.rsplit(":", 1)
        parameter = held[name] if name in held else owner[name]
        state = optimizer.state[parameter]
        if name not in held or value.dim() == 0:
            state[key] = _placed(value, parameter, key, groups[parameter])
            return
        if (parameter, key) not in views:
            state[key] = torch.zeros_like(parameter.data)
            views[parameter, key] = parts[parameter](state[key])
        _fill(views[parameter, key][name], value, full)

    for full in tensors:
        put(full, tensors[full])  # without a name of its own, it is let go before the next is read
    for full, source in values["shared"].items():
        (name, key), (first, of) = full.rsplit(":", 1), source.rsplit(":", 1)
        optimizer.state[owner[name]][key] = optimizer.state[owner[first]][of]


def scheduler_state(saved: Values, n_groups: int) -> dict[str, Any]:
    """A schedule's saved state for an optimizer of so many groups. Raises :class:`TrainingError`."""
    per_group = {key: _for_each(saved[key], n_groups) for key in PER_GROUP if isinstance(saved.get(key), list)}
    return {**saved, **per_group}


def _for_each(saved: Sequence[Any], n_groups: int) -> Sequence[Any]:
    """One value for each group: a buffer is one, single parameters are in several, with the same rates."""
    if len(saved) == n_groups:
        return saved
    if any(value != saved[0] for value in saved):
        raise _unusable(f"it has {len(saved)} learning rates, and the parameters are in {n_groups} groups here")
    return [saved[0]] * n_groups


def _can_be_parted(parameter: torch.Tensor, state: Values) -> bool:
    """Every value is one number for all elements, or a tensor of one for each."""
    return all(
        isinstance(v, torch.Tensor) and (v.dim() == 0 or (v.shape == parameter.shape and v.dtype == parameter.dtype))
        for v in state.values()
    )


def _parted(state: Tensors, pieces: Tensors, part: Part) -> dict[str, torch.Tensor]:
    parted: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        views = {name: value.clone() for name in pieces} if value.dim() == 0 else part(value)
        parted |= {f"{name}:{key}": view.detach().cpu() for name, view in views.items()}
    return parted


def _fill(piece: torch.Tensor, value: torch.Tensor, name: str) -> None:
    if piece.shape != value.shape:
        raise _unusable(f"{name} is {tuple(value.shape)}, and the parameter is {tuple(piece.shape)}")
    piece.copy_(value)


def _placed(value: torch.Tensor, parameter: torch.Tensor, key: str, group: Values) -> torch.Tensor:
    """Where the optimizer keeps it: torch's counter on the CPU, unless a kernel on the card reads it."""
    counts = key == "step" and not (group.get("fused") or group.get("capturable"))
    return value if counts else value.to(parameter.device)


def _check_names(tensors: Tensors, values: Values, owner: Tensors, held: Tensors) -> None:
    stored = {name.rsplit(":", 1)[0] for name in [*tensors, *values["shared"]]}
    plain = values["plain"].keys()
    unknown = sorted((stored | plain) - owner.keys() - held.keys())
    if unknown:
        raise _unusable(f"it is of {unknown[0]}, which is not stepped here")
    mixed = sorted(plain & held.keys())
    if mixed:
        raise _unusable(f"the one of {mixed[0]} has 8 bits, and lies in a buffer with others here")
    lacking = sorted(held.keys() - stored) if stored & held.keys() else []
    if lacking:
        raise _unusable(f"there is none of {lacking[0]}")


def _check_layouts(then: Mapping[str, str], now: Mapping[str, str]) -> None:
    if any(now.get(name) != digest for name, digest in then.items()):
        raise _unusable("it has 8 bits, and the adapters lie in another order here")


def _layout(pieces: Tensors) -> str:
    """A digest of where each piece lies in its buffer."""
    places = sorted([name, piece.storage_offset(), *piece.shape] for name, piece in pieces.items())
    return hashlib.sha256(json.dumps(places).encode()).hexdigest()


def _unusable(what: str) -> TrainingError:
    how = "go on with the machine and the versions that saved it, or run it without resuming"
    return TrainingError(f"the optimizer's state of this checkpoint cannot be used: {what}; {how}")
