"""Memory of a run on transformers' own layers, with PEFT's LoRA: what a family without fused layers trains on.

The peak is the larger of two moments: the loss (all kept tensors and one chunk of logits) and the start of the
backward (all kept tensors, the last layer's own if it is recomputed, its gradients and one dequantized weight). What a
layer saves is in ``layer``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.plan import MemoryBudget
from nbqlora.core.specs import DeviceSpec, MemoryCategory, ModelSpec
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.layer import Attention, attention_of, layer_bytes
from nbqlora.planner.logits import LOSS_CHUNK_BYTES, MAX_CHUNK, MIN_CHUNK, logit_bytes, power_of_two
from nbqlora.planner.standing import adapter_params, quantized, standing_bytes


@dataclass(frozen=True, kw_only=True)
class StockMemory:
    """What one micro-batch takes, by the number of layers that keep everything; the others keep their input.

    Args:
        config, model, device, batch: what runs, and where.
        c: bytes of the dtype.
    """

    config: FinetuneConfig
    model: ModelSpec
    device: DeviceSpec
    batch: MicroBatch
    c: int

    def total_bytes(self, n_keep: int, n_recompute_mlp: int = 0) -> int:
        """The peak."""
        return self.budget(n_keep, n_recompute_mlp).total_bytes

    def budget(self, n_keep: int, n_recompute_mlp: int = 0) -> MemoryBudget:
        """The peak by category. Layers that keep everything stand last.

        Raises:
            ValueError: layers of transformers' own cannot recompute their MLP alone.
        """
        if n_recompute_mlp:
            raise ValueError("transformers' own layers recompute all or nothing")
        tokens, n_layers = self._tokens, self.model.n_layers
        kept = self._kept_bytes()
        stored = n_keep * kept + (n_layers - n_keep) * self.model.d_model * self.c * tokens + self._always_stored()
        loss = self._loss_bytes()
        working = self._working_bytes(n_keep) * tokens + (0 if n_keep else kept)
        dequant = self._dequant_bytes()
        in_loss = loss > working + dequant
        m = MemoryCategory
        parts = {
            **standing_bytes(self.config, self.model, self.device, self.c, captured=False),
            m.ACTIVATIONS: stored + (0 if in_loss else working),
            m.LOSS: loss if in_loss else 0,
            m.DEQUANT: 0 if in_loss else dequant,
        }
        return MemoryBudget(by_category={k: v for k, v in parts.items() if v})

    def loss_chunk_tokens(self, n_keep: int = 0, n_recompute_mlp: int = 0) -> int:
        """Supervised tokens whose logits exist at once: a power of two within 256 MiB, from 64 to 4,096."""
        fits = LOSS_CHUNK_BYTES // (self.model.vocab_size * logit_bytes(self.model, self.device, self.c))
        return max(MIN_CHUNK, min(MAX_CHUNK, power_of_two(fits)))

    @property
    def _tokens(self) -> int:
        return self.batch.tokens(captured=False)

    @property
    def _how(self) -> Attention:
        batch = self.batch
        return attention_of(self.model, self.device, batch.rows if batch.ragged or batch.joined else 1, batch.layout)

    @property
    def _attended(self) -> int:
        """Tokens that a token's mask spans."""
        return self._tokens if self.batch.joined else self.batch.row_tokens

    def _kept_bytes(self) -> int:
        """What one layer that keeps everything holds."""
        per_token = layer_bytes(
            self.model,
            self.c,
            self.config.lora_r,
            row_tokens=self._attended,
            attention=self._how,
            dropout=self.config.lora_dropout > 0,
            on_cpu=self.device.kind == "cpu",
        )
        return per_token * self._tokens

    def _always_stored(self) -> int:
        """What no policy changes: embeddings, last norm and its fp32 input, autocast's adapter, the mask (bool)."""
        tokens = self._tokens
        stored = (2 * self.c + 4) * self.model.d_model * tokens
        stored += adapter_params(self.model, self.config) * self.c if self.c == 2 else 0
        return stored + (tokens * self._attended if self._how is Attention.MASKED else 0)

    def _loss_bytes(self) -> int:
        """One chunk of logits, and the hidden states that the loss counts with their gradient."""
        supervised = self.batch.supervised_tokens
        logits = min(supervised, self.loss_chunk_tokens()) * self.model.vocab_size
        return logits * logit_bytes(self.model, self.device, self.c) + supervised * self.model.d_model * 2 * self.c

    def _working_bytes(self, n_keep: int) -> int:
        """Bytes a token that the backward needs beside what is stored: the larger of its first two moments.

        The last norm: four tensors of the width in fp32; the last layer has not been recomputed yet, if it is.
        The first MLP: the gradients of both factors of its product, when the last norm's tensors are free again.
        Scores that SDPA writes out: three more tensors of them in fp32.
        """
        d, f, c = self.model.d_model, self.model.d_ff, self.c
        scores = 12 * self.model.n_heads * self.batch.row_tokens if self._how is Attention.MATH else 0
        return max((16 if n_keep else 8) * d, 2 * f * c - (4 + c) * d) + scores

    def _dequant_bytes(self) -> int:
        """The widest linear, dequantized, with its scales in fp32."""
        if not quantized(self.model, self.config):
            return 0
        widest = max((math.prod(shape) for shape in self.model.linear_shapes.values()), default=0)
        return int(widest * (self.c + 4 / 64))
