"""Memory of a run on transformers' own layers, with PEFT's LoRA: what a family without fused layers trains on.

The peak is the larger of two kinds of moments: the loss (all kept tensors and one chunk of logits) and the first layer
of each policy in the backward (all tensors kept up to it, its own if it is recomputed, its gradients and one
dequantized weight). What a layer saves is in ``layer``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.plan import MemoryBudget
from nbqlora.core.specs import DeviceSpec, MemoryCategory, ModelSpec
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.layer import Attention, attention_of, layer_bytes, mlp_bytes, mlp_shapes
from nbqlora.planner.logits import LOSS_CHUNK_BYTES, MAX_CHUNK, MIN_CHUNK, logit_bytes, power_of_two
from nbqlora.planner.mix import Mix
from nbqlora.planner.standing import adapter_params, quantized, standing_bytes


@dataclass(frozen=True, kw_only=True)
class StockMemory:
    """What one micro-batch takes, for any mix of layers that do not join.

    Args:
        config, model, device, batch: what runs, and where.
        c: bytes of the dtype.
    """

    config: FinetuneConfig
    model: ModelSpec
    device: DeviceSpec
    batch: MicroBatch
    c: int

    # transformers' own layers neither join nor take their MLP in tiles, and bitsandbytes unpacks their weights.
    joins = False
    tiles: ClassVar[tuple[int, ...]] = ()

    def total_bytes(self, mix: Mix) -> int:
        """The peak."""
        return self.budget(mix).total_bytes

    def budget(self, mix: Mix) -> MemoryBudget:
        """The peak by category.

        Raises:
            ValueError: layers of transformers' own do not join, and have no tiles.
        """
        if mix.join or mix.tile_tokens:
            raise ValueError("transformers' own layers neither join nor run in tiles")
        stored, working = self._moments(mix)
        stored += self._always_stored()
        loss, dequant = self._loss_bytes(), self._dequant_bytes()
        working += self._always_stored()
        in_loss = stored + loss > working + dequant
        m = MemoryCategory
        on_host = mix.offload * self.input_bytes if self.device.kind == "cpu" else 0
        parts = {
            **standing_bytes(self.config, self.model, self.device, self.c),
            m.ACTIVATIONS: (stored if in_loss else working) + on_host,
            m.LOSS: loss if in_loss else 0,
            m.DEQUANT: 0 if in_loss else dequant,
        }
        return MemoryBudget(by_category={k: v for k, v in parts.items() if v})

    def loss_chunk_tokens(self, mix: Mix | None = None) -> int:
        """Supervised tokens whose logits exist at once: a power of two within 256 MiB, from 64 to 4,096."""
        fits = LOSS_CHUNK_BYTES // self.logits
        return max(MIN_CHUNK, min(MAX_CHUNK, power_of_two(fits)))

    @property
    def mlp_alone(self) -> bool:
        """A layer's MLP can be computed again without the rest."""
        return self.model.mlp_alone and bool(mlp_shapes(self.model))

    @property
    def logits(self) -> int:
        """Bytes of logits for each token of a chunk."""
        return self.model.vocab_size * logit_bytes(self.model, self.device, self.c)

    @property
    def most_rows(self) -> int:
        """Tokens that a chunk can use."""
        return self.batch.supervised_tokens

    @property
    def input_bytes(self) -> int:
        """Of one layer's input, which is what a layer that offloads takes on the host."""
        return self.model.d_model * self.c * self._tokens

    def _moments(self, mix: Mix) -> tuple[int, int]:
        """What is stored when all layers have run, and the most of the backward: each policy's first layer."""
        kept, mlp, x = self._kept_bytes(), self._mlp_bytes(), self.input_bytes
        stored = working = 0
        left = mix.n_layers
        # Layers, bytes that each stores, and bytes that are there again in its backward. An offloading layer's holds
        # its gradient to the end, with its input and the next one's.
        runs = (
            (mix.offload, 0, kept + (min(mix.offload, 2) + 1) * x),
            (mix.recompute, x, kept),
            (mix.recompute_mlp, kept - mlp, mlp),
            (mix.keep, kept, 0),
        )
        for n, each, again in runs:
            left -= n
            stored += n * each
            if n:
                working = max(working, stored + again + self._working_bytes(last=not left, kept=not again))
        return stored, working

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

    def _mlp_bytes(self) -> int:
        """What only the MLP of a layer holds."""
        per_token = mlp_bytes(
            self.model,
            self.c,
            self.config.lora_r,
            dropout=self.config.lora_dropout > 0,
            on_cpu=self.device.kind == "cpu",
        )
        return per_token * self._tokens

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
        return min(supervised, self.loss_chunk_tokens()) * self.logits + supervised * self.model.d_model * 2 * self.c

    def _working_bytes(self, *, last: bool, kept: bool) -> int:
        """Bytes that the backward needs beside what is stored: the larger of its first two moments.

        The last norm: four tensors of the width in fp32; the last layer has not been recomputed yet, if it is.
        The first MLP: the gradients of both factors of its product, when the last norm's tensors are free again.
        Scores that SDPA writes out: three more tensors of them in fp32.

        Args:
            last: of the model's last layer.
            kept: the layer computes nothing again.
        """
        d, f, c = self.model.d_model, self.model.d_ff, self.c
        scores = 12 * self.model.n_heads * self.batch.row_tokens if self._how is Attention.MATH else 0
        return self._tokens * (max((16 if last and kept else 8) * d, 2 * f * c - (4 + c) * d) + scores)

    def _dequant_bytes(self) -> int:
        """The widest linear, dequantized, with its scales in fp32."""
        if not quantized(self.model, self.config):
            return 0
        widest = max((math.prod(shape) for shape in self.model.linear_shapes.values()), default=0)
        return int(widest * (self.c + 4 / 64))
