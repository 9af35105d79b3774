"""Memory that runs out where a test wants it: the engine's own functions, raising what torch raises.

A shortage is a condition on what runs: a layer's policy, its tokens, the loss's chunk. While it holds, the place
fails, as a card of that size would, so that the ladder has to come down to where it does not.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from nbqlora.core.events import EvalEvent, OomEvent, PhaseEvent, StepEvent
from nbqlora.engine import fused, head
from nbqlora.engine.layer import Layer
from tests import tiny
from tests.train.parts import Parts, parts

ROWS = tiny.make_rows(24)
# Two micro-batches a step, three layers: forwards and backwards of layers come six a step.
TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "effective_batch_size": None}
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"padding_free": False, **TWO},
    "joined": {**TWO},
    "packed": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
               "effective_batch_size": None, "max_length": 160},
}  # fmt: skip
# Every point is tried with every layout, most of it among the slow tests.
EACH_LAYOUT = ["joined", *(pytest.param(name, marks=pytest.mark.slow) for name in ("padded", "packed"))]
STEPS = 3


def out_of_memory(asked: str = "2.00 GiB") -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {asked}. GPU 0 has a total capacity of ...")


class Shortages:
    """Patches the engine for one test; nothing is counted or fails before :meth:`watch`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._model: Callable[[], Any] = lambda: None
        self.calls = {"forward": 0, "backward": 0, "chunk": 0, "eval": 0}
        self.failed: list[str] = []
        self.error: Callable[[], BaseException] = out_of_memory
        self._at: dict[str, set[int]] = {}
        self._while: dict[str, Callable[..., bool]] = {}
        forward, backward, chunk = fused.layer_forward, fused.layer_backward, head.head_chunk

        def layer_forward(layer: Layer, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found = forward(layer, x, *args, **kwargs)
            self._maybe("forward" if self._model() is not None and self._model().training else "eval", layer, x)
            return found

        def layer_backward(layer: Layer, gradient: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found = backward(layer, gradient, *args, **kwargs)
            self._maybe("backward", layer, gradient)
            return found

        def head_chunk(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._maybe("chunk", hidden)
            return chunk(hidden, *args, **kwargs)

        monkeypatch.setattr(fused, "layer_forward", layer_forward)
        monkeypatch.setattr(fused, "layer_backward", layer_backward)
        monkeypatch.setattr(head, "head_chunk", head_chunk)

    def watch(self, model: Any) -> None:
        """From here on; the model is not held."""
        self._model = weakref.ref(model)

    def __call__(self, event: Any) -> None:
        """As the observer of a run: watch its model from the beginning of its training."""
        if isinstance(event, PhaseEvent) and event.phase == "train":
            (found,) = (o for o in gc.get_objects() if issubclass(type(o), PeftModel))
            self.watch(found)

    def at(self, place: str, *numbers: int) -> None:
        """Fail once in each of these calls, counted from 1, after the work was done."""
        self._at[place] = set(numbers)

    def when(self, place: str, condition: Callable[..., bool]) -> None:
        """Fail as long as this holds."""
        self._while[place] = condition

    def _maybe(self, place: str, *what: Any) -> None:
        if self._model() is None:
            return
        self.calls[place] += 1
        here = self.calls[place] in self._at.get(place, ())
        if here or self._while.get(place, lambda *_: False)(*what):
            self.failed.append(place)
            raise self.error()


@contextmanager
def in_optimizer(*numbers: int, error: Callable[[], BaseException] = out_of_memory) -> Iterator[list[int]]:
    """Fail as an optimizer's step begins; yields the numbers of the calls so far."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(len(calls) + 1)
        if calls[-1] in numbers:
            raise error()

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def shortages(events: Any) -> list[OomEvent]:
    return [e for e in events if isinstance(e, OomEvent)]


class Outcome:
    """What a run left: figures of each step, and the adapter."""

    def __init__(self, found: Parts, short: Shortages | None = None) -> None:
        if short is not None:
            short.watch(found.loaded.model)
        found.trainer.train()
        steps = [e for e in found.events if isinstance(e, StepEvent)]
        self.losses, self.norms = [e.loss for e in steps], [e.grad_norm for e in steps]
        self.tokens = [e.n_tokens for e in steps]
        self.evals = [e.loss for e in found.events if isinstance(e, EvalEvent)]
        self.adapter = {name: p.detach().clone() for name, p in tiny.lora_parameters(found.loaded.model).items()}
        self.shortages = shortages(found.events)
        self.parts = found

    def same_as(self, other: Outcome) -> bool:
        figures = (self.losses, self.norms, self.tokens, self.evals) == (
            other.losses, other.norms, other.tokens, other.evals
        )  # fmt: skip
        return figures and all(torch.equal(p, other.adapter[name]) for name, p in self.adapter.items())

    def near(self, other: Outcome, rel: float = 1e-5) -> bool:
        assert self.tokens == other.tokens
        assert self.losses == pytest.approx(other.losses, rel=rel)
        assert self.evals == pytest.approx(other.evals, rel=rel)
        apart = [(p - other.adapter[n]).norm() / other.adapter[n].norm() for n, p in self.adapter.items()]
        return float(max(apart)) < rel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"), initializer_range=0.2)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """The same run with all the memory it wants, made once for each setting."""
    made: dict[str, Outcome] = {}

    def run(**options: Any) -> Outcome:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = Outcome(parts(model, ROWS, tmp_path_factory.mktemp("whole"), max_steps=STEPS, **options))
        return made[key]

    return run


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Shortages:
    return Shortages(monkeypatch)
