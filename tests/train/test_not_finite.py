"""A loss that is not finite: the row is named, the last good adapter kept, nothing else touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nbqlora.core.errors import NonFiniteLossError
from nbqlora.core.events import SavedEvent, StepEvent
from tests import tiny
from tests.train.parts import finetune, parts

BAD = 7
ROWS = tiny.make_rows(12)
SEQUENTIAL = {"trl": {"train_sampling_strategy": "sequential"}}


def with_bad_row(number: int = BAD) -> list[dict[str, Any]]:
    """The rows, one of which has the token whose embedding is infinite."""
    rows = json.loads(json.dumps(ROWS))
    rows[number - 1]["messages"][0]["content"] += " ~"
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("bad"), bad_token="~")


@pytest.mark.parametrize("how", [{}, {"per_device_train_batch_size": 2}, {"per_device_train_batch_size": 1}], ids=str)
def test_the_row_is_named_and_the_last_good_adapter_kept(model: Path, tmp_path: Path, how: dict[str, int]) -> None:
    good = finetune(model, ROWS, tmp_path / "good", max_steps=1, **SEQUENTIAL, **how)
    seen: list[Any] = []
    with pytest.raises(NonFiniteLossError) as caught:
        finetune(model, with_bad_row(), tmp_path / "bad", observe=seen.append, **SEQUENTIAL, **how)
    assert str(caught.value) == (
        "the loss of step 2 is not finite, on the data's rows 7; the adapter of step 1 was kept\n"
        "  look at these rows; if they are fine, a smaller learning_rate helps"
    )
    assert [e.step for e in seen if isinstance(e, (StepEvent, SavedEvent))] == [1, 1]
    saved = tmp_path / "bad" / "adapter" / "adapter_model.safetensors"
    assert all(t.isfinite().all() for t in load_file(saved).values())
    assert saved.read_bytes() == (good.adapter_dir / "adapter_model.safetensors").read_bytes()
    assert json.loads((tmp_path / "bad" / "run.json").read_text())["status"] == "failed"


def test_in_a_pack_it_is_still_the_row(model: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"^the loss of step 1 is not finite, on the data's rows 7; "):
        finetune(model, with_bad_row(), tmp_path, packing=True, max_length=160, effective_batch_size=8)


def test_several_rows(model: Path, tmp_path: Path) -> None:
    rows = [*with_bad_row(5)[:6], with_bad_row(7)[6], *ROWS[7:]]
    with pytest.raises(NonFiniteLossError, match=r"on the data's rows 5, 7; the adapter of step 1 was kept"):
        finetune(model, rows, tmp_path, **SEQUENTIAL)


def test_before_the_first_step_nothing_is_kept(model: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"on the data's rows 2; no step was taken before it"):
        finetune(model, with_bad_row(2), tmp_path, **SEQUENTIAL)
    assert not (tmp_path / "adapter").exists()
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_a_gradient_that_is_not_finite_under_a_finite_loss(model: Path, tmp_path: Path) -> None:
    found = parts(model, ROWS[:4], tmp_path, max_steps=2)
    lora = tiny.lora_parameters(found.loaded.model)
    before = {name: p.detach().clone() for name, p in lora.items()}
    clip = found.trainer._clip_grad_norm

    def poisoned(model: Any) -> torch.Tensor:
        next(iter(lora.values())).grad.fill_(float("inf"))
        return clip(model)

    found.trainer._clip_grad_norm = poisoned
    with pytest.raises(
        NonFiniteLossError, match=r"^the gradient of step 1 is not finite, on the data's rows 1, 2, 3, 4;"
    ):
        found.trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in lora.items())
