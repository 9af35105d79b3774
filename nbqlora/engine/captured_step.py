"""Forward and backward of a micro-batch as CUDA graphs, replayed: the host launches three times instead of thousands.

At small steps the card waits for the host: 6,500 launches take 200 ms where the kernels need 84. A graph is captured
for a shape the second time it comes (the first time is an ordinary step, which also loads and compiles what the
kernels need), so every step counts and none is a rehearsal.

Three graphs share one memory pool. The first ends at the last layer. The second is the last norm and the loss of one
chunk of supervised tokens, replayed as often as the batch has chunks, because their number varies. The third is the
backward. What the loss and the backward use beside the activations is the same memory, as in an eager step. Graphs of
further shapes lie in the same pool, since only one runs at a time.

Nothing inside asks the card for a number. Loss scale, number of tokens and document boundaries are tensors that are
filled before a replay; gradients are added to the flat buffer, so micro-batches accumulate by being replayed.

Memory of a pool is allocated while a graph is captured, which is when the allocator's peak counts it, and stays
reserved until :meth:`CapturedStep.release`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from nbqlora.core.specs import HeadSpec
from nbqlora.engine.attention import Documents
from nbqlora.engine.fixed_batch import supervised
from nbqlora.engine.fused import Engine
from nbqlora.engine.graphs import Graphs, Inputs, Shape, capture_stream, documents_of_shape, fill, fill_chunk
from nbqlora.engine.head import IGNORED, head_chunk
from nbqlora.kernels.rms_norm import rms_norm_backward
from nbqlora.memory.workspaces import free_workspaces

# Shapes that are kept; the one that was not used for longest is dropped.
MAX_SHAPES = 6


class CapturedStep:
    """Micro-batches of one model, captured by shape.

    Args:
        engine: every layer is fused.
        model: transformers' causal model, its head frozen.
        head: what happens to logits.
        chunk_tokens: supervised tokens whose logits exist at once.
        longest_document: tokens that no document exceeds.
        autocast: makes the context that a forward runs in.
    """

    def __init__(
        self,
        engine: Engine,
        model: Any,
        head: HeadSpec,
        *,
        chunk_tokens: int,
        longest_document: int,
        autocast: Callable[[], Any],
    ) -> None:
        self._engine, self._model, self._head, self._autocast = engine, model, head, autocast
        self._chunk_tokens, self._longest_document = chunk_tokens, longest_document
        self._graphs: OrderedDict[Shape, Graphs] = OrderedDict()
        self._seen: set[Shape] = set()
        self._pool: Any = None
        self.capturing = False
        self._stream = capture_stream(engine.device)

    def __repr__(self) -> str:
        return f"CapturedStep({len(self._graphs)} shapes)"

    def run(self, batch: dict[str, torch.Tensor], factor: torch.Tensor) -> torch.Tensor | None:
        """Loss summed over the supervised tokens, gradients added; None when this shape has to run eagerly once.

        Args:
            batch: made by :func:`fixed_batch`, on the card.
            factor: what the summed loss is multiplied with before the backward, 0-d: loss scale over number of tokens.
        """
        shape = self._shape(batch)
        graphs = self._graphs.get(shape)
        if graphs is None:
            if shape not in self._seen:
                self._seen.add(shape)
                return None
            self.capturing = True  # stays so where it is broken off
            graphs = self._capture(batch, shape)
            self.capturing = False
        self._graphs.move_to_end(shape)
        return self._replay(graphs, batch, factor)

    def documents(self, batch: dict[str, torch.Tensor]) -> Documents:
        """The batch's documents, as the graphs take them: for the step that runs eagerly."""
        shape = self._shape(batch)
        return documents_of_shape(shape, batch.get("boundaries"))

    def _shape(self, batch: dict[str, torch.Tensor]) -> Shape:
        rows, seq = batch["input_ids"].shape
        boundaries = batch.get("boundaries")
        if boundaries is None:
            return Shape(rows=rows, seq=seq, n_documents=0, max_tokens=seq)
        longest = min(seq, self._longest_document)
        return Shape(rows=rows, seq=seq, n_documents=boundaries.numel() - 1, max_tokens=longest)

    def release(self) -> None:
        """Drop every graph, and with them the pool."""
        self._graphs.clear()
        self._seen.clear()
        self._pool = None

    def _replay(self, graphs: Graphs, batch: dict[str, torch.Tensor], factor: torch.Tensor) -> torch.Tensor:
        adapters, inputs = self._engine.scratch.adapters, graphs.inputs
        assert adapters is not None
        adapters.refresh_views()
        fill(inputs, batch, factor)
        labels_are_there = torch.cuda.current_stream().record_event()
        graphs.forward.replay()
        adapters.begin_gradients()  # the card is busy by now
        places, targets = self._learned(batch, labels_are_there)
        for begin in range(0, places.numel(), self._chunk_tokens):
            fill_chunk(inputs, places[begin : begin + self._chunk_tokens], targets[begin : begin + self._chunk_tokens])
            graphs.chunk.replay()
        graphs.backward.replay()
        return graphs.loss.clone()

    def _learned(self, batch: dict[str, torch.Tensor], ready: torch.cuda.Event) -> tuple[torch.Tensor, torch.Tensor]:
        """Places and targets: as the collator found them, or found beside the forward, which does not wait for it."""
        if "places" in batch:
            return batch["places"], batch["targets"]
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            places, targets = supervised(batch["labels"])
        torch.cuda.current_stream().wait_stream(self._stream)
        return places, targets

    def _capture(self, batch: dict[str, torch.Tensor], shape: Shape) -> Graphs:
        adapters = self._engine.scratch.adapters
        assert adapters is not None
        adapters.begin_gradients()
        while len(self._graphs) >= MAX_SHAPES:
            self._graphs.popitem(last=False)
        # The eager step's workspaces and cache: the pool would stand beside them.
        torch.cuda.synchronize()
        free_workspaces()
        torch.cuda.empty_cache()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        inputs = self._inputs(batch)
        state: dict[str, torch.Tensor] = {}
        forward = self._record(lambda: self._forward(inputs, shape, state))
        chunk = self._record(lambda: self._chunk(inputs, state))
        edge = torch.autograd.graph.get_gradient_edge(state["hidden"])
        gradient = state["gradient"][:-1].view_as(state.pop("hidden"))  # the backward may use the memory
        backward = self._record(lambda: torch.autograd.backward((edge,), (gradient,)))
        graphs = Graphs(
            forward=forward, chunk=chunk, backward=backward, inputs=inputs, loss=state["loss"], gradient=gradient
        )
        self._graphs[shape] = graphs
        free_workspaces()  # those of the capture: they lie in the pool, and live as long as it does
        return graphs

    def _record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        slab = self._engine.scratch.slab
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            try:
                work()
            except BaseException:
                if slab is not None:  # a capture cannot end while copies that it began are apart from it
                    slab.forget()
                raise
        return graph

    def _inputs(self, batch: dict[str, torch.Tensor]) -> Inputs:
        device = self._engine.device
        return Inputs(
            ids=batch["input_ids"].clone(),
            positions=batch["position_ids"].clone(),
            boundaries=batch["boundaries"].clone() if "boundaries" in batch else None,
            places=torch.zeros(self._chunk_tokens, dtype=torch.int64, device=device),
            targets=torch.full((self._chunk_tokens,), IGNORED, dtype=torch.int64, device=device),
            factor=torch.ones((), dtype=torch.float32, device=device),
        )

    def _forward(self, inputs: Inputs, shape: Shape, state: dict[str, torch.Tensor]) -> None:
        self._engine.given = documents_of_shape(shape, inputs.boundaries)
        self._engine.leaves_last_norm = True
        try:
            with self._autocast():
                out = self._model.base_model(input_ids=inputs.ids, position_ids=inputs.positions, use_cache=False)
        finally:
            self._engine.given, self._engine.leaves_last_norm = None, False
        state["hidden"] = out.last_hidden_state
        flat = state["hidden"].detach().flatten(0, 1)
        # One row more than there are tokens: where a chunk's padding puts its gradients.
        state["gradient"] = torch.zeros(flat.shape[0] + 1, flat.shape[1], dtype=flat.dtype, device=flat.device)
        state["loss"] = torch.zeros((), dtype=torch.float32, device=flat.device)

    def _chunk(self, inputs: Inputs, state: dict[str, torch.Tensor]) -> None:
        """The last norm and the head for the rows of a chunk alone, there and back."""
        norm, output = self._engine.last_norm, self._model.get_output_embeddings()
        assert norm is not None
        hidden = state["hidden"].detach().flatten(0, 1)
        rows = hidden.index_select(0, inputs.places.clamp(max=hidden.shape[0] - 1))
        read, rstd = norm(rows)
        losses, slope = head_chunk(read.to(output.weight.dtype), output.weight, output.bias, inputs.targets, self._head)
        assert slope is not None
        state["loss"] += losses.sum()
        scaled = (slope * inputs.factor).to(hidden.dtype)
        found = rms_norm_backward(scaled, rows, norm.weight, rstd, style=norm.style)
        state["gradient"].index_copy_(0, inputs.places, found)
