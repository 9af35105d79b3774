"""``gradient_checkpointing`` as a table: layers by policy."""

from __future__ import annotations

from collections.abc import Mapping

from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.specs import ModelSpec
from nbqlora.planner.mix import Mix

_NUMBERS = ("no", "one", "two", "three", "four", "five")


def layers_asked(asked: Mapping[str, int], model: ModelSpec, *, fused: bool) -> Mix:
    """The layers that a table names.

    A number that is left out is the rest: of ``keep`` first, then of ``recompute``.

    Args:
        fused: the model's layers will be fused ones; others do not join.

    Raises:
        ConfigError: they are not as many as the model has, or cannot be that.
    """
    n, (mlp, offload, join) = model.n_layers, (asked.get(k, 0) for k in ("recompute_mlp", "offload", "join"))
    if join and not fused:
        message = f"layers of a {model.architecture} model cannot join: each needs an input of its own"
        raise _problem(message, "write recompute or offload in place of join")
    if mlp and not (fused or model.mlp_alone):
        message = f"layers of a {model.architecture} model have no MLP that could be computed again alone"
        raise _problem(message, "write recompute in place of recompute_mlp")
    others = mlp + offload + join
    keep = asked.get("keep", n - asked.get("recompute", 0) - others)
    rest = n - keep - others
    if min(keep, rest) < 0 or asked.get("recompute", rest) != rest:
        raise _problem(*_wrong(asked, n))
    if join and not rest + offload:
        message = f"{join} layers have none to join: nothing before them recomputes or offloads"
        raise _problem(message, "write recompute or offload beside join; its layers are shared out among those")
    return Mix(keep=keep, recompute_mlp=mlp, recompute=rest, offload=offload, join=join)


def _wrong(asked: Mapping[str, int], n: int) -> tuple[str, str]:
    """What was written, and what would do."""
    written = " + ".join(f"{count} {name}" for name, count in asked.items())
    if len(asked) == 1:
        return f"{written}, but this model has {n} layers", f"at most {n}"
    hint = f"at most {n} in all"
    if asked.keys() >= {"keep", "recompute"}:
        fewer = len(asked) - 1
        hint = f"{_NUMBERS[fewer]} of the {_NUMBERS[len(asked)]} numbers {'is' if fewer == 1 else 'are'} enough"
    return f"{written} = {sum(asked.values())}, but this model has {n} layers", hint


def _problem(message: str, hint: str) -> ConfigError:
    return ConfigError([Problem(key="gradient_checkpointing", message=message, hint=hint)])
