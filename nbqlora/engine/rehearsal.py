"""A decoder layer that no model has, run once before there is a model, so that the first real one finds its kernels.

What a first step waits for on a new machine is not arithmetic: Triton compiles some sixteen kernels, a C compiler their
launchers, and CUDA loads the kernels of matmuls and of attention one by one, ten seconds for a model of any size. None
of it needs weights, and nothing here needs a library beyond torch and triton; so it runs in a thread beside the imports
of those that do. Kernels are compiled for widths, dtypes and alignments, never for values: a layer of zeros with the
model's widths has them all. What a shape does not tell (a bias, a partial rotation) is compiled when it is met.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nbqlora.engine.attention import AttentionKind, attention_backward, attention_forward, choose_attention
from nbqlora.engine.group import Group, Scratch
from nbqlora.engine.layer import Heads, Layer, Norm
from nbqlora.engine.layer_probe import PROBE_TOKENS, documents_of, through_ours
from nbqlora.engine.layer_shape import LayerShape
from nbqlora.engine.match import ACTIVATIONS
from nbqlora.engine.optimize import flat_adapters, scratch_bytes
from nbqlora.engine.projection import Lora, Projection
from nbqlora.kernels._launch import launches_of_a_share
from nbqlora.kernels.cross_entropy import cross_entropy_
from nbqlora.kernels.nf4 import Nf4
from nbqlora.kernels.rms_norm import rms_norm_backward
from nbqlora.memory.arena import DequantArena
from nbqlora.memory.workspaces import free_workspaces

# Of elements that share an entry of absmax, and of those that share one of the second quantization.
BLOCK, NESTED = 64, 256


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A layer's forward and backward, and what stands behind the last one.

    Args:
        dtype: of the arithmetic.
        in_4bit: its linears are NF4 with double quantization.
        lora_r: rank of the adapters.
        adapted: names of the linears that have one; None for all.
    """

    shape: LayerShape
    device: torch.device
    dtype: torch.dtype
    in_4bit: bool
    lora_r: int
    adapted: tuple[str, ...] | None = None

    def run(self) -> None:
        """Do it, and give the memory back: a layer's weights, 0.3 GiB for an 8B's with its scratch."""
        try:
            for kind, lengths in self.attention_calls():
                self._layer(kind, lengths)
            self._stock_attention()
            self._head()
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                free_workspaces()
                torch.cuda.empty_cache()

    def run_share(self, number: int, n: int) -> None:
        """Only so that one of ``n`` processes of a machine compiles its share of the kernels, into Triton's cache.

        Behind it and :meth:`attend` comes :meth:`run`, which gives the memory back.
        """
        with launches_of_a_share(number, n):
            self._layer(*self.attention_calls()[0])
            self._head()

    def attend(self) -> None:
        """Only attention, whose kernels CUDA loads for seconds without Python: for a thread beside a share."""
        h = self.shape
        for kind, lengths in self.attention_calls():
            q = self._zeros(PROBE_TOKENS, h.n_heads, h.head_dim, dtype=self.dtype)
            k, v = (self._zeros(PROBE_TOKENS, h.n_kv_heads, h.head_dim, dtype=self.dtype) for _ in range(2))
            documents, scale = documents_of(q[None], lengths), h.head_dim**-0.5
            out, kept = attention_forward(kind, q, k, v, documents, scale=scale, softcap=h.softcap)
            attention_backward(kind, out, q, k, v, out, kept, documents, scale=scale, softcap=h.softcap)
        self._stock_attention()

    def _layer(self, kind: AttentionKind, lengths: tuple[int, ...]) -> None:
        """Forward and backward, with documents of these lengths."""
        x = self._zeros(1, PROBE_TOKENS, self.shape.d_model, dtype=self.dtype)
        turned = self._zeros(1, PROBE_TOKENS, self.shape.head_dim, dtype=self.dtype)
        through_ours(self.layer(), x, x, (turned, turned), kind, lengths)

    def _head(self) -> None:
        """The last norm, and the loss with its gradient."""
        n, last = PROBE_TOKENS, self._norm("norm", self.shape.d_model)
        assert last is not None
        x = self._zeros(n, self.shape.d_model, dtype=self.dtype)
        _, rstd = last(x)
        rms_norm_backward(x, x, last.weight, rstd, style=last.style)
        logits = self._zeros(n, self.shape.vocab_size, dtype=self.dtype)
        cross_entropy_(logits, self._zeros(n, dtype=torch.int64), factor=1.0)

    def attention_calls(self) -> list[tuple[AttentionKind, tuple[int, ...]]]:
        """What computes attention, of documents of which lengths: in a layer's probe, in rows alone and end to end."""
        on_card, h = self.device.type == "cuda", self.shape
        capability = torch.cuda.get_device_capability(self.device) if on_card else None
        lengths = {True: (PROBE_TOKENS,), False: (PROBE_TOKENS // 2,) * 2}
        chosen = [
            choose_attention(
                device_type=self.device.type, capability=capability, dtype=self.dtype, head_dim=h.head_dim,
                window=None, softcap=h.softcap, dense=dense,
            )[0]
            for dense in lengths
        ]  # fmt: skip
        probed = AttentionKind.MATH if h.softcap else AttentionKind.SDPA
        return list(dict.fromkeys([(probed, lengths[True]), *zip(chosen, lengths.values(), strict=True)]))

    def layer(self) -> Layer:
        """The layer, of zeros."""
        shape, family, scratch = self.shape, self.shape.family, Scratch(DequantArena(self.device, 0))
        found = [self._projection(name, *sizes) for name, sizes in shape.linears.items()]
        at = list(shape.linears).index("o_proj")
        qkv, o, gate_up, down = found[:at], found[at : at + 1], found[at + 1 : -1], found[-1:]
        layer = Layer(
            qkv=Group(qkv, joined=True, reads_own=True),
            o=Group(o, joined=True, reads_own=False),
            gate_up=Group(gate_up, joined=len(gate_up) == 1, reads_own=True),
            down=Group(down, joined=True, reads_own=False),
            heads=Heads(
                n=shape.n_heads, n_kv=shape.n_kv_heads, dim=shape.head_dim, scale=shape.head_dim**-0.5,
                softcap=shape.softcap, normed=family.qk_norm,
            ),
            activation=ACTIVATIONS[shape.activation],
            scratch=scratch,
            attention_in=self._norm(family.attention_in, shape.d_model),
            attention_out=self._norm(family.attention_out, shape.d_model),
            mlp_in=self._norm(family.mlp_in, shape.d_model),
            mlp_out=self._norm(family.mlp_out, shape.d_model),
            q_norm=self._head_norm(shape.n_heads),
            k_norm=self._head_norm(shape.n_kv_heads),
        )  # fmt: skip
        scratch.arena = DequantArena(self.device, scratch_bytes(layer, self.dtype))
        scratch.adapters = flat_adapters({"layer": layer}, self.dtype)
        return layer

    def _norm(self, name: str, width: int) -> Norm | None:
        if not name:
            return None
        weight = torch.zeros(width, dtype=self.dtype, device=self.device)
        return Norm(weight=weight, eps=1e-6, style=self.shape.family.norm)

    def _head_norm(self, n_heads: int) -> Norm | None:
        over = self.shape.family.qk_norm
        return self._norm(over, self.shape.head_dim * (n_heads if over == "full" else 1))

    def _projection(self, name: str, n_out: int, n_in: int) -> Projection:
        weight = self._nf4(n_out, n_in) if self.in_4bit else self._zeros(n_out, n_in, dtype=self.dtype)
        adapted = self.adapted is None or name in self.adapted
        lora = self._lora(n_out, n_in) if adapted else None
        return Projection(name=name, weight=weight, bias=None, n_out=n_out, n_in=n_in, lora=lora)

    def _lora(self, n_out: int, n_in: int) -> Lora:
        a, b = (torch.nn.Parameter(self._zeros(*size)) for size in ((self.lora_r, n_in), (n_out, self.lora_r)))
        return Lora(a=a, b=b, scale=1.0, dropout=torch.nn.Identity(), module=None)

    def _nf4(self, n_out: int, n_in: int) -> Nf4:
        n_blocks = -(-n_out * n_in // BLOCK)
        return Nf4(
            packed=self._zeros(n_out * n_in // 2, dtype=torch.uint8),
            absmax=self._zeros(n_blocks, dtype=torch.uint8),
            code=self._zeros(16),
            n_rows=n_out,
            n_cols=n_in,
            blocksize=BLOCK,
            nested_absmax=self._zeros(-(-n_blocks // NESTED)),
            nested_code=self._zeros(256),
            offset=self._zeros(),
            nested_blocksize=NESTED,
        )

    def _zeros(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)

    def _stock_attention(self) -> None:
        """As transformers' own layer has it in the probe, with a mask; and its backward."""
        shape, n = self.shape, PROBE_TOKENS
        size = (1, shape.n_heads, n, shape.head_dim)
        q, k, v = (self._zeros(*size, dtype=self.dtype).requires_grad_() for _ in range(3))
        with torch.enable_grad():
            mask = self._zeros(1, 1, n, n, dtype=self.dtype)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            torch.autograd.grad(out, [q, k, v], torch.zeros_like(out))
