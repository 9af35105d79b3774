"""What is taken out of a training loop goes back to the last bit, through the files that a checkpoint uses."""

from __future__ import annotations

import inspect
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nbqlora.train.optimizer_state import optimizer_state, set_optimizer_state
from nbqlora.train.resumable import POSITION, ResumableTrainer
from nbqlora.train.state import TrainingState, kept_random_state, random_state, set_random_state
from tests import tiny
from tests.train.parts import Parts, parts

ROWS = tiny.make_rows(10)
PADDED: dict[str, Any] = {"packing": False, "padding_free": False}  # 4 rows a step, the last of 3 has 2
OTHERS = tiny.make_rows(3, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


def drawn() -> tuple[Any, ...]:
    """One number of each generator, and of each distribution that keeps a spare one."""
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(1))


def through_files(groups: Any, values: Any, folder: Path) -> tuple[dict[str, Any], Any]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, group in groups.items():
        save_file(dict(group), folder / f"{name}.safetensors")
    read = {name: load_file(folder / f"{name}.safetensors") for name in groups}
    return read, json.loads(json.dumps(values, allow_nan=False))


@pytest.mark.parametrize("spare", [False, True])
def test_random_numbers_go_on_from_where_they_stood(tmp_path: Path, spare: bool) -> None:
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    if spare:
        drawn()
    groups, _ = through_files({"rng": random_state()}, {}, tmp_path)
    expected = [drawn() for _ in range(700)]  # more than the 624 words of a generator
    drawn()
    set_random_state(groups["rng"])
    assert [drawn() for _ in range(700)] == expected


def test_random_numbers_drawn_within_leave_no_trace() -> None:
    with kept_random_state():
        inside = drawn()
    assert drawn() == inside
    with pytest.raises(LookupError), kept_random_state():
        inside = drawn()
        raise LookupError
    assert drawn() == inside


OPTIMIZERS = {
    "adamw_torch": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
    "adamw_torch_fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw_8bit": lambda groups: bnb.optim.AdamW8bit(groups, lr=1e-2, weight_decay=0.1),
}


class Trained:
    """Three parameters in two groups: one large enough for 8-bit states, one small, one that is never used."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.parameters = {name: torch.nn.Parameter(torch.randn(n, 96)) for name, n in (("a", 64), ("b", 2), ("c", 3))}
        a, b, c = self.parameters.values()
        self.optimizer = OPTIMIZERS[kind]([{"params": [a, c]}, {"params": [b], "weight_decay": 0.0}])
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.names = {p: name for name, p in self.parameters.items()}

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        for name in "ab":
            self.parameters[name].grad = torch.randn_like(self.parameters[name])
        self.optimizer.step()
        self.scheduler.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    whole, again = Trained(kind), Trained(kind)
    for seed in range(5):
        whole.step(seed)
    tensors, values = optimizer_state(whole.optimizer, whole.names)
    values = {"optimizer": values, "scheduler": whole.scheduler.state_dict()}
    groups, values = through_files({"optimizer": tensors}, values, tmp_path)
    assert all(name.split(":")[0] in "ab" for name in groups["optimizer"])
    for name, p in again.parameters.items():
        p.data.copy_(whole.parameters[name].data)
    set_optimizer_state(again.optimizer, again.names, groups["optimizer"], values["optimizer"])
    again.scheduler.load_state_dict(values["scheduler"])
    for seed in range(5, 10):
        whole.step(seed), again.step(seed)
        assert whole.scheduler.get_last_lr() == again.scheduler.get_last_lr()
        assert all(torch.equal(p, again.parameters[name]) for name, p in whole.parameters.items())


def test_a_map_that_all_share_is_kept_once() -> None:
    a, b = (torch.nn.Parameter(torch.randn(64, 96)) for _ in range(2))
    optimizer = bnb.optim.AdamW8bit([a, b])
    a.grad = b.grad = torch.randn_like(a)
    optimizer.step()
    tensors, values = optimizer_state(optimizer, {a: "a", b: "b"})
    assert values["shared"] == {"b:qmap1": "a:qmap1", "b:qmap2": "a:qmap2"}
    own = {"state1", "state2", "absmax1", "absmax2"}
    assert tensors.keys() == {f"{name}:{key}" for name in "ab" for key in own} | {"a:qmap1", "a:qmap2"}


OVERRIDDEN = (
    "_save_checkpoint", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state",
)  # fmt: skip


def after(found: Parts, step: int) -> TrainingState:
    """Train to the end, with a checkpoint at a step; what was saved there."""
    stopping = found.trainer.callback_handler.callbacks

    class Save(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = state.global_step == step

    assert stopping
    found.trainer.add_callback(Save())
    found.trainer.train()
    return found.states[0]


def test_the_methods_that_are_replaced_exist_and_are_called(model: Path, tmp_path: Path) -> None:
    for name in OVERRIDDEN:
        theirs, ours = (inspect.signature(getattr(c, name)) for c in (transformers.Trainer, ResumableTrainer))
        assert list(theirs.parameters) == list(ours.parameters), name
    calls: Counter[str] = Counter()

    def counted(found: Parts) -> None:
        for name in OVERRIDDEN:
            method = getattr(found.trainer, name)

            def call(*args: Any, name: str = name, method: Any = method) -> Any:
                calls[name] += 1
                return method(*args)

            setattr(found.trainer, name, call)

    first, second = (parts(model, ROWS, tmp_path, **PADDED, lora_dropout=0.1, num_train_epochs=2) for _ in range(2))
    counted(first)
    state = after(first, 2)
    assert calls == {"_save_checkpoint": 2}  # ours at step 2, and the end
    assert state.step == 2 and set(state.values["position"]) == set(POSITION)
    calls.clear()
    counted(second)
    second.trainer.go_on(state)
    assert calls == dict.fromkeys(OVERRIDDEN, 1)


def test_a_state_is_tensors_and_json(model: Path, tmp_path: Path) -> None:
    state = after(parts(model, ROWS, tmp_path, optim="adamw_8bit", lora_r=32, lr_scheduler_type="cosine"), 2)
    groups, values = through_files(state.groups, state.values, tmp_path / "files")
    assert values == json.loads(json.dumps(state.values)) and values["scaler"] is None
    assert {name: group.keys() for name, group in groups.items()} == {n: g.keys() for n, g in state.groups.items()}
    assert repr(state) == "TrainingState(after step 2)"


def test_inside_an_epoch_its_beginning_is_kept_and_between_two_there_is_none(model: Path, tmp_path: Path) -> None:
    for step, ended in ((1, False), (3, True), (4, False)):
        found = parts(model, ROWS, tmp_path, **PADDED, lora_dropout=0.1, num_train_epochs=2)
        state = after(found, step)
        same = torch.equal(state.groups["rng"]["torch"], state.groups["epoch_rng"]["torch"])
        assert same is ended, step


def test_the_loss_scale_goes_on(model: Path, tmp_path: Path) -> None:
    first, second, third = (parts(model, ROWS, tmp_path) for _ in range(3))
    # A CPU has no fp16 training; the scaler itself needs no card.
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=3)
    state = after(first, 1)
    for found in (first, second):
        found.trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 96.5, "_growth_tracker": 2})
    first.trainer.accelerator.scaler = scaler
    first.trainer.create_optimizer_and_scheduler(3)
    values = json.loads(json.dumps(first.trainer.state_now().values))
    assert values["scaler"]["scale"] == 96.5
    scaled = TrainingState(step=1, groups=state.groups, values=values)
    second.trainer._resumed = scaled
    second.trainer._load_scaler(None)
    assert second.trainer.accelerator.scaler.state_dict() == scaler.state_dict()
    # On a card that trains in bf16 there is none to set.
    third.trainer._resumed = scaled
    third.trainer._load_scaler(None)
    assert third.trainer.accelerator.scaler is None


def test_an_evaluation_is_not_seen_by_the_training(model: Path, tmp_path: Path) -> None:
    found = parts(model, ROWS, tmp_path, eval_data=OTHERS)
    before = random_state()
    found.trainer.evaluate()
    assert all(torch.equal(t, before[name]) for name, t in random_state().items())
