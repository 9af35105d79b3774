"""An optimizer's state goes back once: one copy on the device, one tensor of it in the host's memory, any layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from nbqlora.core.errors import TrainingError
from nbqlora.engine.adapters import FlatAdapters
from nbqlora.engine.optimizer import FLAT_NAME, make_optimizer
from nbqlora.hub.checkpoint import Checkpoint
from nbqlora.train.optimizer_state import Parts, optimizer_state, set_optimizer_state
from tests.train.storages import Storages

# Some large enough for 8-bit states on their own, and all of them together.
SHAPES = {"q.A": (8, 600), "q.B": (700, 8), "k.A": (8, 96), "k.B": (64, 8)}
KINDS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit")


class Trained:
    """An optimizer on its own parameters, or on one buffer that holds them."""

    def __init__(self, kind: str, *, flat: bool, order: tuple[str, ...] = tuple(SHAPES), device: str = "cpu") -> None:
        torch.manual_seed(0)
        drawn = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        self.parameters = {name: torch.nn.Parameter(drawn[name].to(device)) for name in order}
        own = list(self.parameters.values())
        self.adapters = FlatAdapters(own, [False] * len(own), torch.float32) if flat else None
        others = [] if flat else own
        self.optimizer = make_optimizer(self.adapters, others, optim=kind, learning_rate=1e-2, weight_decay=0.1)
        self.names = {p: name for name, p in self.parameters.items()}
        self.parts: Parts = {}
        if flat:
            self.names[self.optimizer.flat] = FLAT_NAME
            self.parts = {self.optimizer.flat: self.pieces}

    def pieces(self, buffer: torch.Tensor) -> Mapping[str, torch.Tensor]:
        assert self.adapters is not None
        return {name: self.adapters.view(buffer, p) for name, p in self.parameters.items()}

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        gradients = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        if self.adapters is not None:
            self.adapters.begin_gradients()
        for name, p in self.parameters.items():
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(gradients[name])
        self.optimizer.step()

    def take(self) -> tuple[dict[str, torch.Tensor], Any]:
        return optimizer_state(self.optimizer, self.names, self.parts)

    def put(self, tensors: Mapping[str, torch.Tensor], values: Any) -> None:
        set_optimizer_state(self.optimizer, self.names, tensors, values, self.parts)


def trained(kind: str, n_steps: int = 3, **how: Any) -> Trained:
    found = Trained(kind, **how)
    for seed in range(n_steps):
        found.step(seed)
    return found


def through_files(taken: tuple[dict[str, torch.Tensor], Any], folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    save_file(taken[0], folder / "optimizer.safetensors")
    return load_file(folder / "optimizer.safetensors"), json.loads(json.dumps(taken[1], allow_nan=False))


@pytest.mark.parametrize("to_flat", [True, False], ids=["to a buffer", "to single ones"])
@pytest.mark.parametrize("from_flat", [True, False], ids=["from a buffer", "from single ones"])
@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_torch_fused"])
def test_a_state_fits_any_layout(kind: str, from_flat: bool, to_flat: bool, tmp_path: Path) -> None:
    before = trained(kind, flat=from_flat)
    tensors, values = through_files(before.take(), tmp_path)
    assert tensors.keys() == {f"{name}:{key}" for name in SHAPES for key in ("step", "exp_avg", "exp_avg_sq")}
    after = Trained(kind, flat=to_flat, order=tuple(reversed(SHAPES)))
    for name, p in after.parameters.items():
        p.data.copy_(before.parameters[name].data)
    after.put(tensors, values)
    again, _ = after.take()
    assert again.keys() == tensors.keys() and all(torch.equal(t, again[name]) for name, t in tensors.items())
    before.step(9), after.step(9)
    for name, p in before.parameters.items():
        # The last elements of a row of memory may be computed by another instruction than the others.
        torch.testing.assert_close(after.parameters[name].data, p.data, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_layout_goes_on_bit_for_bit(kind: str, flat: bool, tmp_path: Path) -> None:
    before, after = trained(kind, flat=flat), Trained(kind, flat=flat)
    for name, p in after.parameters.items():
        p.data.copy_(before.parameters[name].data)
    after.put(*through_files(before.take(), tmp_path))
    for seed in range(5, 9):
        before.step(seed), after.step(seed)
        assert all(torch.equal(p.data, after.parameters[name].data) for name, p in before.parameters.items())


@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_goes_where_the_optimizer_itself_would_put_it(kind: str) -> None:
    before = trained(kind, flat=False)
    ours, theirs = (Trained(kind, flat=False, device="meta") for _ in range(2))
    ours.put(*before.take())
    theirs.optimizer.load_state_dict(before.optimizer.state_dict())
    for p, q in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        states = [
            {k: (v.device.type, v.dtype, v.shape) if isinstance(v, torch.Tensor) else v for k, v in state.items()}
            for state in (ours.optimizer.state[p], theirs.optimizer.state[q])
        ]
        assert states[0] == states[1] and any(v[0] == "meta" for v in states[0].values() if isinstance(v, tuple))


class Large:
    """A trained optimizer whose state is in a file, and a new one on a card."""

    def __init__(self, kind: str, flat: bool, folder: Path) -> None:
        shapes = {f"layer{i}.{k}": shape for i in range(6) for k, shape in (("A", (16, 1024)), ("B", (2048, 16)))}

        def made(device: str) -> tuple[Any, dict[Any, str], Parts]:
            own = {name: torch.nn.Parameter(torch.randn(shape, device=device)) for name, shape in shapes.items()}
            adapters = FlatAdapters(list(own.values()), [False] * len(own), torch.float32) if flat else None
            optimizer = make_optimizer(adapters, [] if flat else own.values(), optim=kind, learning_rate=1e-2)
            names: dict[Any, str] = {p: name for name, p in own.items()}
            if adapters is None:
                return optimizer, names, {}
            part = lambda buffer: {name: adapters.view(buffer, p) for name, p in own.items()}  # noqa: E731
            return optimizer, {**names, optimizer.flat: FLAT_NAME}, {optimizer.flat: part}

        optimizer, names, parts = made("cpu")
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        if flat:
            optimizer.adapters.begin_gradients()
        optimizer.step()
        tensors, self.values = optimizer_state(optimizer, names, parts)
        save_file(tensors, folder / "optimizer.safetensors")
        self.largest = max(t.nbytes for t in tensors.values())
        held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        self.n_bytes = sum(s.nbytes() for s in {t.untyped_storage()._cdata: t.untyped_storage() for t in held}.values())
        self.on_card, self.names, self.parts = made("meta")

        empty: dict[str, Any] = {"identity": {}, "state": {}, "files": {}}
        self.tensors = Checkpoint(folder=folder, step=1, total_steps=2, saved_at=0.0, **empty).tensors("optimizer")


# The counters of each parameter, and a quantization map that is kept once in the file and for all.
SMALL = 16 << 10


@pytest.mark.parametrize("flat", [True, False], ids=["a buffer", "single ones"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_once_on_the_device_and_never_whole_in_the_host(kind: str, flat: bool, tmp_path: Path) -> None:
    large = Large(kind, flat, tmp_path)
    with Storages() as seen:
        set_optimizer_state(large.on_card, large.names, large.tensors, large.values, large.parts)
    assert 0.99 * large.n_bytes < seen.peak["meta"] <= large.n_bytes + SMALL
    # A buffer in 8 bits has two large tensors.
    assert seen.peak["cpu"] <= large.largest + SMALL
    assert large.largest < (0.5 if flat and kind == "adamw_8bit" else 0.1) * large.n_bytes


@pytest.mark.parametrize("kind,copies", [("adamw_torch", 1), ("adamw_8bit", 2)])
def test_load_state_dict_holds_all_of_it_in_the_host(kind: str, copies: int, tmp_path: Path) -> None:
    """What is avoided, seen with the same instrument."""
    large = Large(kind, False, tmp_path)
    with Storages() as seen:
        named: dict[str, dict[str, Any]] = {name: dict(state) for name, state in large.values["plain"].items()}
        for full, tensor in large.tensors.items():
            name, key = full.rsplit(":", 1)
            named.setdefault(name, {})[key] = tensor
        whole = large.on_card.state_dict()
        whole["state"] = dict(enumerate(named.values()))
        large.on_card.load_state_dict(whole)
    assert seen.peak["cpu"] > 0.98 * copies * large.n_bytes


def test_a_state_of_other_parameters_is_refused_and_nothing_is_changed() -> None:
    before = trained("adamw_torch", flat=False)
    tensors, values = before.take()
    values = {**values, "rates": [{"lr": 5.0}]}
    after = Trained("adamw_torch", flat=True)
    end = "; go on with the machine and the versions that saved it, or run it without resuming$"
    with pytest.raises(TrainingError, match="cannot be used: it is of v.A, which is not stepped here" + end):
        after.put({**tensors, "v.A:exp_avg": torch.zeros(2)}, values)
    without = {name: t for name, t in tensors.items() if not name.startswith("k.B")}
    with pytest.raises(TrainingError, match="there is none of k.B" + end):
        after.put(without, values)
    assert not after.optimizer.state and after.optimizer.param_groups[0]["lr"] == 1e-2
    with pytest.raises(TrainingError, match=r"k.B:exp_avg is \(8, 64\), and the parameter is \(64, 8\)" + end):
        after.put({**tensors, "k.B:exp_avg": tensors["k.B:exp_avg"].T}, values)


def test_8_bit_states_of_a_buffer_need_the_layout_that_they_had() -> None:
    tensors, values = trained("adamw_8bit", flat=True).take()
    assert {name.split(":")[0] for name in tensors} == {FLAT_NAME}
    Trained("adamw_8bit", flat=True).put(tensors, values)
    with pytest.raises(TrainingError, match="it has 8 bits, and the adapters lie in another order here"):
        Trained("adamw_8bit", flat=True, order=tuple(reversed(SHAPES))).put(tensors, values)
    with pytest.raises(TrainingError, match=f"it is of {FLAT_NAME}, which is not stepped here"):
        Trained("adamw_8bit", flat=False).put(tensors, values)
    single = trained("adamw_8bit", flat=False).take()
    with pytest.raises(TrainingError, match=r"the one of k\.A has 8 bits, and lies in a buffer with others here"):
        Trained("adamw_8bit", flat=True).put(*single)


def test_a_map_that_all_share_is_shared_again() -> None:
    a, b = (torch.nn.Parameter(torch.randn(64, 96)) for _ in range(2))
    before, after = bnb.optim.AdamW8bit([a, b]), bnb.optim.AdamW8bit([a, b])
    a.grad = b.grad = torch.randn_like(a)
    before.step()
    set_optimizer_state(after, {a: "a", b: "b"}, *optimizer_state(before, {a: "a", b: "b"}))
    assert after.state[a]["qmap1"] is after.state[b]["qmap1"]
