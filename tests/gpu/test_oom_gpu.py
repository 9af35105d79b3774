"""Real memory that runs out on a card: a limit below the plan, a ballast, another process, a capture without room."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import nbqlora
from nbqlora.core.errors import MemoryExhaustedError
from nbqlora.core.events import EvalEvent, OomEvent, PhaseEvent, StepEvent
from nbqlora.core.specs import LayerPolicy
from nbqlora.core.units import GIB, MIB
from nbqlora.engine import fused
from nbqlora.engine.micro_step import MicroStep
from tests import tiny

pytestmark = pytest.mark.gpu
# Rows of one length; the plan keeps everything, and may: it is told of more memory than there will be.
OPTIONS: dict[str, Any] = {
    "max_length": 1024, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 5,
    "learning_rate": 1e-3, "lora_r": 8, "warmup_ratio": 0, "gradient_checkpointing": "none", "packing": False,
    "padding_free": False, "dtype": "bf16",
}  # fmt: skip
# Holds all of the card but so much, until its input ends; says when it does.
TAKE = """
import sys, torch
free = torch.cuda.mem_get_info()[0]
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


def rows(n: int, words: int = 700) -> list[dict[str, str]]:
    return [{"prompt": f"say {i}", "completion": "sun moon river " * (words // 3)} for i in range(n)]


def allocated() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.fixture(autouse=True)
def all_of_the_card() -> Iterator[None]:
    allocated()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def forget_graphs() -> None:
    """A replay asks for no memory: drop what was captured, as a batch of a new shape finds it."""
    torch.cuda.synchronize()
    for step in [o for o in gc.get_objects() if type(o) is MicroStep]:
        step.release()
    torch.cuda.empty_cache()


def limit(n_bytes: float) -> None:
    """What this process may reserve from now on."""
    forget_graphs()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, n_bytes / total))


class At:
    """Does something once, when the run tells of a step (0: of the beginning of training)."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act, self.events = step, act, []

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        begun = isinstance(event, PhaseEvent) and event.phase == "train" and self.step == 0
        if begun or (isinstance(event, StepEvent) and event.step == self.step):
            self.act()

    @property
    def shortages(self) -> list[OomEvent]:
        return [e for e in self.events if isinstance(e, OomEvent)]


def train(folder: Path, out: Path, observe: Any = None, **changes: Any) -> nbqlora.Run:
    options = {"model": str(folder), "data": rows(40), "output_dir": str(out), **OPTIONS, **changes}
    return nbqlora.finetune(**options, observe=observe)


def same(found: nbqlora.Run, whole: nbqlora.Run, rel: float = 5e-3) -> None:
    assert found.status == "done"
    assert [e.step for e in found.report.steps] == [e.step for e in whole.report.steps]
    assert [e.n_tokens for e in found.report.steps] == [e.n_tokens for e in whole.report.steps]
    assert [e.loss for e in found.report.steps] == pytest.approx([e.loss for e in whole.report.steps], rel=rel)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("share", [0.7, 0.45])
@pytest.mark.parametrize("step", [0, 3], ids=["first", "late"])
def test_a_card_smaller_than_the_plan(step: int, share: float, dtype: str, medium_folder: Path, tmp_path: Path) -> None:
    before = allocated()
    whole = train(medium_folder, tmp_path / "whole", dtype=dtype)
    peak = whole.report.measured_peak_bytes - before
    whole.free()
    observe = At(step, lambda: limit(before + share * peak))
    run = train(medium_folder, tmp_path / "run", observe, dtype=dtype)
    print(f"{dtype} {share} step {step}: {[(e.step, e.phase, e.action) for e in observe.shortages]}")
    same(run, whole)
    assert observe.shortages and {e.step for e in observe.shortages} <= set(range(step and step + 1, 6))
    assert "lowered" in [d.name for d in run.plan.decisions]


def test_documents_end_to_end_are_cut_between_them(medium_folder: Path, tmp_path: Path) -> None:
    before = allocated()
    how = {"padding_free": None, "per_device_train_batch_size": 8, "gradient_checkpointing": "full"}
    whole = train(medium_folder, tmp_path / "whole", max_steps=2, **how)
    peak, held = whole.report.measured_peak_bytes - before, allocated() - before
    whole.free()
    observe = At(0, lambda: limit(before + held + 0.4 * (peak - held)))
    run = train(medium_folder, tmp_path / "run", observe, max_steps=2, ram_gib=0, **how)
    print([(e.step, e.phase, e.action) for e in observe.shortages])
    same(run, whole)
    assert any(e.action.endswith("run in parts") for e in observe.shortages)


def test_one_long_document(tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 16384, "num_hidden_layers": 4, "num_attention_heads": 16,
            "num_key_value_heads": 4, "max_position_embeddings": 4096}  # fmt: skip
    wide_folder, before = tiny.save_model(tmp_path / "wide", **wide), allocated()
    how = {"max_length": 4096, "data": rows(8, 8000), "per_device_train_batch_size": 1, "max_steps": 2,
           "gradient_accumulation_steps": 1, "gradient_checkpointing": "full"}  # fmt: skip
    whole = train(wide_folder, tmp_path / "whole", **how)
    peak, held = whole.report.measured_peak_bytes - before, allocated() - before
    whole.free()
    observe = At(0, lambda: limit(before + held + 0.7 * (peak - held)))
    run = train(wide_folder, tmp_path / "run", observe, ram_gib=0, **how)
    print([(e.step, e.phase, e.action) for e in observe.shortages])
    same(run, whole)
    assert any(e.action.startswith("MLPs take") for e in observe.shortages)


def test_a_ballast_that_comes_and_goes(medium_folder: Path, tmp_path: Path) -> None:
    whole = train(medium_folder, tmp_path / "whole")
    whole.free()
    held: list[torch.Tensor] = []

    def fill() -> None:
        forget_graphs()
        free = torch.cuda.mem_get_info()[0]
        held.append(torch.empty(free - 256 * MIB, dtype=torch.uint8, device="cuda"))

    observe = At(2, fill)
    run = train(medium_folder, tmp_path / "run", observe)
    held.clear()
    same(run, whole)
    assert observe.shortages and min(e.step for e in observe.shortages) >= 3


def test_another_process_takes_the_card_in_the_middle(medium_folder: Path, tmp_path: Path) -> None:
    whole = train(medium_folder, tmp_path / "whole")
    whole.free()
    others: list[subprocess.Popen[str]] = []

    def start() -> None:
        forget_graphs()
        command = [sys.executable, "-c", TAKE, str(GIB // 2)]
        others.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert others[0].stdout is not None and others[0].stdout.readline() == "held\n"

    observe = At(2, start)
    try:
        run = train(medium_folder, tmp_path / "run", observe)
    finally:
        for other in others:
            other.communicate()
    print([(e.step, e.phase, e.action) for e in observe.shortages])
    same(run, whole)
    assert observe.shortages


class WhileCapturing:
    """Asks for more than any card has in the middle of a capture, so often."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: str, times: int) -> None:
        self.left, self.calls, work = times, 0, getattr(fused, place)

        def wanting(*args: Any, **kwargs: Any) -> Any:
            found = work(*args, **kwargs)
            if torch.cuda.is_current_stream_capturing() and self.left:
                self.calls += 1
                if self.calls % 5 == 0:
                    self.left -= 1
                    torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
            return found

        monkeypatch.setattr(fused, place, wanting)


@pytest.mark.parametrize("place", ["layer_forward", "layer_backward"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("mix", ["none", {"offload": 6, "keep": 6}], ids=["keep", "offload"])
def test_a_capture_without_room_is_abandoned(
    mix: Any, times: int, place: str, medium_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"lora_dropout": 0.1, "max_steps": 6, "gradient_checkpointing": mix}
    whole = train(medium_folder, tmp_path / "whole", **options)
    whole.free()
    before, reserved = allocated(), torch.cuda.memory_reserved()
    wanting, observe = WhileCapturing(monkeypatch, place, times), At(-1, lambda: None)
    run = train(medium_folder, tmp_path / "run", observe, **options)
    assert wanting.left == 0
    same(run, whole, rel=2e-2)
    told = ["unused memory was given back", "steps are launched kernel by kernel: there was no room to capture one"]
    assert [e.action for e in observe.shortages] == told[:times]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert run.plan.layer_policies == whole.plan.layer_policies
    assert (LayerPolicy.OFFLOAD in run.plan.layer_policies) == (mix != "none")
    run.free()
    assert allocated() - before <= 64 * MIB and torch.cuda.memory_reserved() - reserved <= 128 * MIB
    torch.rand(8, device="cuda")  # the generator is not left in a capture


def test_an_evaluation_of_longer_rows(medium_folder: Path, tmp_path: Path) -> None:
    before = allocated()
    how = {"data": rows(40, 60), "eval_data": rows(16, 700), "max_steps": 2, "trl": {"per_device_eval_batch_size": 16}}
    whole = train(medium_folder, tmp_path / "whole", **how)
    held = allocated() - before
    whole.free()
    observe = At(0, lambda: limit(before + held + 260 * MIB))
    run = train(medium_folder, tmp_path / "run", observe, **how)
    print([(e.step, e.phase, e.action) for e in observe.shortages])
    losses = [[e.loss for e in r.events if isinstance(e, EvalEvent)] for r in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert any(e.phase == "eval" for e in observe.shortages)


@pytest.mark.parametrize("step", [0, 2])
def test_when_nothing_fits_the_card_is_as_empty_as_before(step: int, medium_folder: Path, tmp_path: Path) -> None:
    before, reserved = allocated(), torch.cuda.memory_reserved()
    observe = At(step, lambda: (forget_graphs(), limit(torch.cuda.memory_allocated() + 4 * MIB)))
    with pytest.raises(MemoryExhaustedError, match="with nothing left to lower") as caught:
        train(medium_folder, tmp_path, observe)
    print(caught.value)
    assert "all memory of this run was given back" in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert allocated() - before <= 64 * MIB, "the error, still held, keeps memory"
    assert torch.cuda.memory_reserved() - reserved <= 128 * MIB
    assert (tmp_path / "adapter").exists() == (step > 0)
