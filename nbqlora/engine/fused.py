"""Fused layers on a loaded model: instances get a forward of their own, the model a hook that prepares each call.

The hook looks at what a call asks for. Training and evaluation without a cache go through the fused layers, which
know their documents and need no mask; generation, left padding, adapters that are off or merged go through
transformers' own forward, untouched. transformers builds no mask when it is handed one of four dimensions, so it is
handed an empty one.

Autograd sees one node a layer. The adapters are inputs of it, so that it knows what trains; their gradients do not pass
through it, but are added to the flat buffer behind ``.grad``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nbqlora.engine.attention import AttentionKind, Documents, choose_attention
from nbqlora.engine.calls import documents_of, padded_on_the_right
from nbqlora.engine.group import Scratch
from nbqlora.engine.inputs import send_input, store_input
from nbqlora.engine.last_norm import norm_forward
from nbqlora.engine.layer import Call, Layer, Norm
from nbqlora.engine.layer_backward import layer_backward
from nbqlora.engine.layer_forward import layer_forward
from nbqlora.engine.sharded import ShardedWeights

# Where a model keeps its engine: an attribute of the instance, no submodule.
ATTRIBUTE = "_nbqlora_engine"


class _FusedLayer(torch.autograd.Function):
    """``hidden [rows, seq, d_model]`` -> the same; adapters' gradients go to their buffers."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, layer: Layer, call: Call, *parameters: torch.Tensor) -> torch.Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        with layer.opened(), torch.autocast(hidden.device.type, enabled=False):
            send_input(layer, x)
            out, kept = layer_forward(layer, x, call)
            ctx.stored = store_input(layer, call, kept, need_input=ctx.needs_input_grad[0])
        ctx.layer, ctx.call, ctx.names, ctx.n_parameters = layer, call, tuple(kept), len(parameters)
        ctx.save_for_backward(*kept.values())
        return out.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        kept = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        adapters = ctx.layer.scratch.adapters
        if adapters is not None and not adapters.has_gradients(ctx.layer.parameters):
            adapters.begin_gradients()
        flat = gradient.flatten(0, 1)
        with ctx.layer.opened(), torch.autocast(flat.device.type, enabled=False):
            ctx.stored.find(kept)
            found = layer_backward(ctx.layer, flat, kept, ctx.call, need_input=ctx.needs_input_grad[0])
        input_gradient = None if found is None else found.view(gradient.shape)
        return (input_gradient, None, None, *(None for _ in range(ctx.n_parameters)))


class Engine:
    """What stands on one model.

    Args:
        decoder: the module whose forward runs the layers.
        layers: fused layers by path.
        modules: the decoder layers by path, all of them.
        last_norm: the decoder's, where it is one that we have.
        shards: the layers' weights, where they are split over cards.
    """

    def __init__(
        self,
        decoder: Any,
        layers: Mapping[str, Layer],
        modules: Mapping[str, Any],
        scratch: Scratch,
        dtype: torch.dtype,
        last_norm: Norm | None = None,
        shards: ShardedWeights | None = None,
    ) -> None:
        self.decoder, self.layers, self.modules, self.scratch, self.dtype = decoder, layers, modules, scratch, dtype
        self.given: Documents | None = None
        self._now: Documents | None = None
        self._flat: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._kinds: dict[tuple[Any, ...], tuple[AttentionKind, str]] = {}
        self.last_norm, self.shards = last_norm, shards
        self.leaves_last_norm = False
        self._own_forwards: dict[Any, Any] = {}
        self._hooks: list[Any] = []

    @property
    def complete(self) -> bool:
        """Every decoder layer is fused."""
        return len(self.layers) == len(self.modules)

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return self.scratch.arena.device

    def install(self) -> None:
        """Put forwards and hooks on the instances."""
        for path, layer in self.layers.items():
            self._replace(self.modules[path], _forward_of(self, self.modules[path], layer))
        if self.last_norm is not None:
            self._replace(
                self.decoder.norm, norm_forward(self.decoder.norm, self.last_norm, lambda: self.leaves_last_norm)
            )
        self._hooks = [
            self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.decoder.register_forward_hook(self._end, always_call=True),
        ]

    def _replace(self, module: Any, forward: Any) -> None:
        self._own_forwards[module] = module.__dict__.get("forward")
        module.forward = forward

    def remove(self, *, own_storage: bool = True) -> None:
        """Take them off again, and give the adapters storage of their own, unless nothing may be allocated."""
        for hook in self._hooks:
            hook.remove()
        for module, own in self._own_forwards.items():
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own
        self._hooks, self._own_forwards = [], {}
        self.scratch.arena.free()
        if self.scratch.slab is not None:
            self.scratch.slab.free()
            self.scratch.slab = None
        if self.scratch.adapters is not None and own_storage:
            self.scratch.adapters.release()

    def kind_for(self, layer: Layer, *, dense: bool) -> AttentionKind:
        """How attention runs for this layer's heads; ``dense``: each row is one document."""
        return self.attention_choice(layer, dense=dense)[0]

    def attention_choice(self, layer: Layer, *, dense: bool) -> tuple[AttentionKind, str]:
        """The kind and the reason."""
        h = layer.heads
        key = (h.dim, h.window, h.softcap, dense)
        if key not in self._kinds:
            on_card = self.device.type == "cuda"
            self._kinds[key] = choose_attention(
                device_type=self.device.type,
                capability=torch.cuda.get_device_capability(self.device) if on_card else None,
                dtype=self.dtype,
                head_dim=h.dim,
                window=h.window,
                softcap=h.softcap,
                dense=dense,
            )
        return self._kinds[key]

    def call(self, layer: Layer, positions: tuple[torch.Tensor, torch.Tensor]) -> Call:
        """What the layer needs to know of the present forward."""
        assert self._now is not None
        documents = self._now
        cos, sin = self._flat_positions(positions, documents)
        kind = self.kind_for(layer, dense=documents.cu_seqlens is None)
        return Call(documents=documents, cos=cos, sin=sin, attention=kind)

    @property
    def active(self) -> bool:
        """Whether the present forward goes through the fused layers."""
        return self._now is not None

    def _flat_positions(
        self, positions: tuple[torch.Tensor, torch.Tensor], documents: Documents
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = positions
        found = self._flat.get(id(cos))
        if found is None or found[0] is not cos:
            rows, width = documents.rows, cos.shape[-1]
            flat = [t.to(self.dtype).expand(rows, -1, -1).reshape(-1, width) for t in (cos, sin)]
            found = self._flat[id(cos)] = (cos, flat[0], flat[1])
        return found[1], found[2]

    def _begin(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        self._now = None
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if ids is None or not self._fuses(kwargs):
            return None
        self._now = self.given or documents_of(ids, kwargs)
        if self.shards is not None:
            self.shards.begin_pass(trains=torch.is_grad_enabled())
        adapters = self.scratch.adapters
        if adapters is not None:
            adapters.refresh()
            if torch.is_grad_enabled() and module.training:
                adapters.begin_gradients()
        changed = {**kwargs, "use_cache": False}
        if self.complete:
            changed["attention_mask"] = torch.empty(1, 1, 1, 1, dtype=self.dtype, device=self.device)
        return tuple(args), changed

    def _end(self, *_: Any) -> None:
        self._now, self.scratch.joined = None, None
        if self.scratch.slab is not None:
            self.scratch.slab.settle()
        self._flat.clear()

    def _fuses(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether this call is one that the fused layers stand for."""
        if kwargs.get("past_key_values") is not None or kwargs.get("output_attentions"):
            return False
        caches = kwargs.get("use_cache")
        caches = self.decoder.config.use_cache if caches is None else caches
        if caches and not (self.decoder.training and torch.is_grad_enabled()):
            return False
        return padded_on_the_right(kwargs.get("attention_mask")) and self._adapters_are_on()

    def _adapters_are_on(self) -> bool:
        """PEFT can switch adapters off, merge them, or add others; each is its own forward's affair."""
        for layer in self.layers.values():
            for group in layer.groups:
                for projection in group.projections:
                    if projection.lora is None:
                        continue
                    module = projection.lora.module
                    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
                        return False
        return True


def engine_of(model: Any) -> Engine | None:
    """The engine that stands on a model, if one does."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: Engine | None = base.__dict__.get(ATTRIBUTE)
    return found


def _forward_of(engine: Engine, module: Any, layer: Layer) -> Any:
    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not engine.active:
            own: torch.Tensor = type(module).forward(module, hidden_states, *args, **kwargs)
            return own
        call = engine.call(layer, kwargs["position_embeddings"])
        hidden = hidden_states.to(engine.dtype)
        if torch.is_grad_enabled():
            out: torch.Tensor = _FusedLayer.apply(hidden, layer, call, *layer.parameters)
        else:
            with layer.opened(), torch.autocast(hidden.device.type, enabled=False):
                out = layer_forward(layer, hidden.reshape(-1, hidden.shape[-1]), call)[0].view(hidden.shape)
        return out.to(hidden_states.dtype)

    return forward
