"""``gradient_checkpointing`` as a table: layers by policy."""

from __future__ import annotations

from collections.abc import Mapping

from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.specs import ModelSpec


def layers_asked(asked: Mapping[str, int], model: ModelSpec, *, fused: bool) -> tuple[int, int]:
    """How many layers a table keeps, and of how many it recomputes the MLP.

    A number that is left out is the rest: of ``keep`` first, then of ``recompute``.

    Args:
        fused: the model's layers will be fused ones; others recompute all or nothing.

    Raises:
        ConfigError: they are not as many as the model has, or cannot be that.
    """
    n, mlp = model.n_layers, asked.get("recompute_mlp", 0)
    if mlp and not fused:
        message = f"layers of a {model.architecture} model recompute all or nothing"
        raise _problem(message, "write recompute in place of recompute_mlp")
    keep = asked.get("keep", n - asked.get("recompute", 0) - mlp)
    rest = n - keep - mlp
    if min(keep, rest) >= 0 and asked.get("recompute", rest) == rest:
        return keep, mlp
    raise _problem(*_wrong(asked, n))


def _wrong(asked: Mapping[str, int], n: int) -> tuple[str, str]:
    """What was written, and what would do."""
    written = " + ".join(f"{count} {name}" for name, count in asked.items())
    if len(asked) == 1:
        return f"{written}, but this model has {n} layers", f"at most {n}"
    hint = f"at most {n} in all"
    if asked.keys() >= {"keep", "recompute"}:
        hint = "one of the two numbers is enough" if len(asked) == 2 else "two of the three numbers are enough"
    return f"{written} = {sum(asked.values())}, but this model has {n} layers", hint


def _problem(message: str, hint: str) -> ConfigError:
    return ConfigError([Problem(key="gradient_checkpointing", message=message, hint=hint)])
