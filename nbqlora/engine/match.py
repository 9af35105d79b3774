"""transformers' decoder layer -> :class:`Layer`, or the reason why not.

Read off the modules and the family's row; nothing is changed here.
"""

from __future__ import annotations

from typing import Any

import torch

from nbqlora.core.families import FAMILIES, Family
from nbqlora.engine.group import Group, Scratch
from nbqlora.engine.layer import Heads, Layer, Norm
from nbqlora.engine.projection import NotMatchedError, Projection, read_projection
from nbqlora.kernels.glu import Activation

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def family_of(config: Any) -> Family:
    """The family's row. Raises :class:`NotMatchedError` for one that has none."""
    name = str(config.model_type)
    if name not in FAMILIES:
        raise NotMatchedError(f"no row for the family {name}")
    return FAMILIES[name]


def read_layer(module: Any, config: Any, scratch: Scratch) -> Layer:
    """What the fused layer needs of ``module``.

    Args:
        module: a decoder layer.
        config: the text model's config.

    Raises:
        NotMatchedError: some part of it is not as the family's row says, or trains where nothing should.
    """
    family, attention, mlp = family_of(config), _part(module, "self_attn"), _part(module, "mlp")
    if any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in module.children()):
        raise NotMatchedError("its residual has dropout")
    qkv = _projections(attention, ("qkv_proj",), ("q_proj", "k_proj", "v_proj"))
    gate_up = _projections(mlp, ("gate_up_proj",), ("gate_proj", "up_proj"))
    heads = _heads(attention, config, family, qkv)
    layer = Layer(
        qkv=Group(qkv, joined=True, reads_own=True),
        o=Group(_projections(attention, ("o_proj",)), joined=True, reads_own=False),
        gate_up=Group(gate_up, joined=len(gate_up) == 1, reads_own=True),
        down=Group(_projections(mlp, ("down_proj",)), joined=True, reads_own=False),
        heads=heads,
        activation=_activation(config),
        scratch=scratch,
        attention_in=_norm(module, family.attention_in, family),
        attention_out=_norm(module, family.attention_out, family),
        mlp_in=_norm(module, family.mlp_in, family),
        mlp_out=_norm(module, family.mlp_out, family),
        q_norm=_norm(attention, "q_norm", family) if family.qk_norm else None,
        k_norm=_norm(attention, "k_norm", family) if family.qk_norm else None,
        residual_scale=float(getattr(module, "residual_multiplier", 1.0)),
    )
    _check_shape(layer, config)
    return layer


def _part(module: Any, name: str) -> Any:
    found = getattr(module, name, None)
    if found is None:
        raise NotMatchedError(f"it has no {name}")
    return found


def _projections(module: Any, *choices: tuple[str, ...]) -> list[Projection]:
    for names in choices:
        if all(hasattr(module, n) for n in names):
            return [read_projection(n, getattr(module, n)) for n in names]
    raise NotMatchedError(f"{type(module).__name__} has no {' or '.join(choices[-1])}")


def read_last_norm(decoder: Any) -> Norm | None:
    """The norm behind the last layer; None where it is of another kind."""
    try:
        return _norm(decoder, "norm", family_of(decoder.config))
    except NotMatchedError:
        return None


def _norm(module: Any, name: str, family: Family) -> Norm | None:
    if not name:
        return None
    found = _part(module, name)
    eps = getattr(found, "variance_epsilon", getattr(found, "eps", None))
    if eps is None or getattr(found, "bias", None) is not None:
        raise NotMatchedError(f"{name} is a {type(found).__name__}, not an RMSNorm")
    if found.weight.requires_grad:
        raise NotMatchedError(f"{name} is trained")
    return Norm(weight=found.weight.detach(), eps=float(eps), style=family.norm)


def _heads(attention: Any, config: Any, family: Family, qkv: list[Projection]) -> Heads:
    dim = int(attention.head_dim)
    n, n_kv = int(config.num_attention_heads), int(config.num_key_value_heads)
    if sum(p.n_out for p in qkv) != (n + 2 * n_kv) * dim:
        raise NotMatchedError("q, k and v are not heads of one width")
    if getattr(attention, "sinks", None) is not None:
        raise NotMatchedError("its attention has sinks")
    if float(getattr(attention, "attention_dropout", 0.0) or 0.0) > 0:
        raise NotMatchedError("its attention has dropout")
    if not getattr(attention, "is_causal", True):
        raise NotMatchedError("its attention is not causal")
    return Heads(
        n=n,
        n_kv=n_kv,
        dim=dim,
        scale=float(attention.scaling),
        window=_window(attention, config, family),
        softcap=getattr(attention, "attn_logit_softcapping", None),
        rotates=bool(getattr(attention, "use_rope", True)),
        normed=family.qk_norm,
    )


def _window(attention: Any, config: Any, family: Family) -> int | None:
    if not family.window:
        return None
    found = getattr(attention if family.window == "module" else config, "sliding_window", None)
    return int(found) if found else None


def _activation(config: Any) -> Activation:
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "")
    if name not in ACTIVATIONS:
        raise NotMatchedError(f"its activation is {name}")
    return ACTIVATIONS[name]


def _check_shape(layer: Layer, config: Any) -> None:
    d, down = int(config.hidden_size), layer.down
    if layer.qkv.n_in != d or layer.o.n_out != d or layer.gate_up.n_in != d or down.n_out != d:
        raise NotMatchedError("its projections are not as wide as the model")
    if layer.gate_up.n_out != 2 * down.n_in:
        raise NotMatchedError("gate and up are not as wide as down reads")
