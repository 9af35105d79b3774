"""A trainer on a tiny model, put together as ``nbqlora.run`` does it, for what can only be seen from inside."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import nbqlora
from nbqlora.core.config import FinetuneConfig
from nbqlora.core.events import EvalEvent, Event, StepEvent
from nbqlora.core.plan import Plan
from nbqlora.engine.loaded import LoadedModel
from nbqlora.engine.surgery import keep_linears_trainable
from nbqlora.hub.load import load
from nbqlora.planner import make_plan
from nbqlora.run.loading import prepare
from nbqlora.run.look import look
from nbqlora.train.arguments import trainer_arguments
from nbqlora.train.events import EventCallback, StepMeter
from nbqlora.train.state import TrainingState
from nbqlora.train.stop import Stop
from nbqlora.train.trainer import QLoraTrainer
from tests import tiny

# Constant, so that the first step moves too; small batches, so that several ways to split them exist.
OPTIONS: dict[str, Any] = {
    "max_length": 96,
    "packing": False,
    "effective_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "lora_r": 4,
}


@dataclass
class Parts:
    """What a run is made of."""

    config: FinetuneConfig
    plan: Plan
    loaded: LoadedModel
    trainer: QLoraTrainer
    events: list[Event] = field(default_factory=list)
    states: list[TrainingState] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [e.loss for e in self.events if isinstance(e, StepEvent)]


def finetune(model: Path, data: Any, out: Path, **changes: Any) -> nbqlora.Run:
    """A whole run."""
    return nbqlora.finetune(**{"model": str(model), "data": data, "output_dir": str(out), **OPTIONS, **changes})


def losses(run: nbqlora.Run) -> list[float]:
    return [e.loss for e in run.report.steps]


def evals(run: nbqlora.Run) -> list[float]:
    return [e.loss for e in run.events if isinstance(e, EvalEvent)]


def parts(model: Path, data: Any, out: Path, *, change: Any = None, ram_bytes: int = 0, **changes: Any) -> Parts:
    """Everything up to ``trainer.train()``.

    Args:
        ram_bytes: host memory that inputs of layers may take when memory runs out.
        change: called with the loaded model before the loss is chosen.
    """
    options = {"model": str(model), "data": data, "output_dir": str(out), **OPTIONS, **changes}
    config = FinetuneConfig(**options)
    seen = look(config, "run", lambda line: None)
    plan = make_plan(config, seen.spec, seen.device, seen.train.stats, output_dir=str(out))
    loaded = load(config, plan, seen.location, seen.tokenizer)
    if change is not None:
        change(loaded.model)
    prepare(loaded, plan)
    events: list[Event] = []
    states: list[TrainingState] = []
    meter = StepMeter()
    callback = EventCallback(
        emit=events.append, meter=meter, stop=Stop(), peak=lambda: 0, clock=lambda: 0.0, save_seconds=0
    )
    trainer = QLoraTrainer(
        loaded=loaded,
        arguments=trainer_arguments(config, plan, seen.evaluation is not None),
        train_dataset=seen.train.dataset,
        eval_dataset=None if seen.evaluation is None else seen.evaluation.dataset,
        meter=meter,
        find_rows=seen.train.find_rows,
        save_state=states.append,
        enter=lambda phase: None,
        ram_bytes=ram_bytes,
        tell_short=callback.out_of_memory,
        callbacks=[callback],
    )
    return Parts(config, plan, loaded, trainer, events, states)


def base(folder: Path, adapter: Path | None = None) -> Any:
    """The saved model as a run loads it, with a saved adapter or with none."""
    model = tiny.load_nf4(folder)
    keep_linears_trainable(model)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()


def own_loss(model: Any, rows: list[dict[str, Any]], max_length: int = 96) -> tuple[float, int]:
    """Mean loss a supervised token over all rows, row by row from the model's own logits, and the tokens."""
    from nbqlora.core.specs import BatchLayout
    from nbqlora.data.encode import encode
    from nbqlora.data.rows import read_rows

    data = encode(read_rows(rows), tiny.make_tokenizer(), max_length=max_length, layout=BatchLayout.PADDED)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in data.dataset:
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].double()
            labels = torch.tensor(row["labels"][1:])
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count, count
