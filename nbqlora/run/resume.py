"""How a run begins: from its first step, or after the furthest whole checkpoint of the same run.

Looked at after the plan and before anything is loaded, so that a run that cannot be resumed costs seconds.
A run started anew beside an unfinished one of its own says so and leaves those checkpoints: what is the
same run takes the same steps, so they stay valid, and ``--resume`` goes on from the furthest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from nbqlora import planner
from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import DoesNotFitError, RunError
from nbqlora.core.plan import Plan
from nbqlora.core.specs import BatchLayout, LayerPolicy
from nbqlora.core.units import format_seconds
from nbqlora.hub.checkpoint import Checkpoint, first_whole
from nbqlora.hub.manifest import WEIGHTS
from nbqlora.hub.save import ADAPTER_FOLDER
from nbqlora.run.identity import differences, identity
from nbqlora.run.look import Look
from nbqlora.run.versions import changed_versions


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Where a run begins.

    Args:
        plan: with notes on what was found.
        identity: what its checkpoints carry.
        checkpoint: what it goes on from; None for the first step.
        furthest: the furthest step of this run that is on the disk, 0 for none.
        damaged: checkpoints that were passed over, to be removed when there is a new one.
    """

    plan: Plan
    identity: Mapping[str, Any]
    checkpoint: Checkpoint | None = None
    furthest: int = 0
    damaged: frozenset[Path] = frozenset()


def begin(config: FinetuneConfig, seen: Look, *, resume: bool, how: str) -> Beginning:
    """Plan the run, and find what it goes on from.

    Args:
        resume: go on from a checkpoint where there is one.
        how: what the user writes to resume, for notes.

    Raises:
        ConfigError, DoesNotFitError: as the planner's.
        RunError: the checkpoints are of another run, with each difference; or none of them is whole.
    """
    plan = _plan(config, seen)
    own = identity(config, plan, seen.location, seen.tokenizer)
    found, unreadable = seen.checkpoints()
    same = [c for c in found if not differences(c.identity, own)]
    if not resume:
        notes = [*_beside(same, found, unreadable, plan, how), *_replaces(seen)]
        return Beginning(plan=_noted(plan, *notes), identity=own, furthest=same[0].step if same else 0)
    if found and not same:
        raise RunError(_other_run(found[0], own, plan))
    checkpoint, damaged = first_whole(same)
    notes = [f"passed over {line}" for line in [*unreadable, *damaged.values()]]
    passed = frozenset(damaged)
    if checkpoint is None and notes:
        raise RunError(_none_whole(plan, [*unreadable, *damaged.values()]))
    if checkpoint is None:
        note = f"{plan.output_dir} holds no checkpoint to go on from: this run starts from the beginning"
        return Beginning(plan=_noted(plan, note), identity=own)
    again = _as_planned_then(config, seen, plan, checkpoint)
    changes = [*_changes(checkpoint.state["plan"], again), *changed_versions(checkpoint.state["versions"])]
    whole = _noted(again, f"goes on {_where(checkpoint)}", *notes, *changes)
    return Beginning(plan=whole, identity=own, checkpoint=checkpoint, furthest=checkpoint.step, damaged=passed)


def laid_out_then(config: FinetuneConfig, seen: Look) -> Look:
    """The rows as the furthest checkpoint has them: padded where the model, once it was loaded, asked for that."""
    found, _ = seen.checkpoints()
    free = config.packing == "auto" and config.padding_free is None
    if not free or not found or found[0].state["plan"]["layout"] != BatchLayout.PADDED.value:
        return seen
    return seen.laid_out(BatchLayout.PADDED, "as this run began: its model, once loaded, did not keep documents apart")


def resumed(checkpoint: Checkpoint) -> str:
    """``resumed after step 12 of 40, saved 3 min ago``."""
    return f"resumed {_where(checkpoint)}"


def plan_facts(plan: Plan) -> dict[str, Any]:
    """What a checkpoint keeps of the plan: what the machine decided."""
    return {
        "device": [plan.device.kind, plan.device.name],
        "dtype": plan.dtype,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "n_cards": plan.n_cards,
        "shards": plan.shards,
        "layers": dict(Counter(policy.value for policy in plan.layer_policies)),
        "layout": plan.data.layout.value,
        "n_eval_rows": plan.data.n_eval_rows,
    }


def _plan(config: FinetuneConfig, seen: Look) -> Plan:
    return planner.make_plan(
        config,
        seen.spec,
        seen.device,
        seen.train.stats,
        output_dir=str(seen.output_dir),
        notes=seen.notes,
        cards=seen.cards,
    )


def _noted(plan: Plan, *notes: str) -> Plan:
    return replace(plan, notes=(*plan.notes, *notes))


def _where(checkpoint: Checkpoint) -> str:
    ago = format_seconds(max(0.0, datetime.now().timestamp() - checkpoint.saved_at))
    return f"after step {checkpoint.step} of {checkpoint.total_steps}, saved {ago} ago"


def _beside(same: list[Checkpoint], found: list[Checkpoint], unreadable: list[str], plan: Plan, how: str) -> list[str]:
    """What a run that starts anew says about the checkpoints in its folder."""
    if same and same[0].step < same[0].total_steps:
        done, when = f"{same[0].step} of {same[0].total_steps} steps", _clock(same[0].saved_at)
        offer = f"{plan.output_dir} holds {done} of this same run, saved {when}"
        return [f"{offer}; stop this and {how} to go on from there"]
    if same or not (found or unreadable):
        return []
    done = f"{found[0].step} of {found[0].total_steps} steps of another run" if found else "checkpoints nobody can read"
    return [f"{plan.output_dir} holds {done}; they are replaced when this run first saves"]


def _clock(seconds: float) -> str:
    """``14:03`` of today, the date before it otherwise."""
    then = datetime.fromtimestamp(seconds)
    today = then.date() == datetime.now().date()
    return then.strftime("%H:%M" if today else "%Y-%m-%d %H:%M")


def _replaces(seen: Look) -> list[str]:
    there = (seen.output_dir / ADAPTER_FOLDER / WEIGHTS).exists()
    return [f"{seen.output_dir} holds the adapter of an earlier run, which this one replaces"] if there else []


def _other_run(checkpoint: Checkpoint, own: Mapping[str, Any], plan: Plan) -> str:
    done = f"{checkpoint.step} of {checkpoint.total_steps} steps"
    lines = [f"{plan.output_dir} holds {done} of another run, so this one cannot go on from there"]
    lines += [f"  {line}" for line in differences(checkpoint.identity, own)]
    return "\n".join([*lines, "  write the former values, or give this run another name"])


def _none_whole(plan: Plan, lines: list[str]) -> str:
    """Checkpoints are there and cannot be used: a run from the beginning would replace them, so it has to be asked."""
    head = f"{plan.output_dir} holds no checkpoint to go on from; nothing of it was touched"
    found = [f"  {line}" for line in lines]
    return "\n".join([head, *found, "  run it without resuming to start from the beginning, which replaces them"])


def _as_planned_then(config: FinetuneConfig, seen: Look, plan: Plan, checkpoint: Checkpoint) -> Plan:
    """On the same machine the split and the layers of then, if they still fit: other ones would round otherwise."""
    then = checkpoint.state["plan"]
    if then["device"] != [plan.device.kind, plan.device.name] or then.get("n_cards", 1) != plan.n_cards:
        return plan
    pins: dict[str, Any] = {"gpus": plan.n_cards}
    if config.per_device_train_batch_size is None and config.gradient_accumulation_steps is None:
        pins |= {name: then[key] for name, key in _SPLIT.items()}
    # Layers that joined cannot where weights are split now.
    can_be = plan.shards == 1 or not then["layers"].get(LayerPolicy.JOIN.value)
    if config.gradient_checkpointing == "auto" and can_be:
        pins["gradient_checkpointing"] = then["layers"]
    try:
        return _plan(replace(config, effective_batch_size=plan.effective_batch_size, **pins), seen)
    except DoesNotFitError:
        return plan


_SPLIT = {
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}


def _split(facts: Mapping[str, Any]) -> str:
    """``2 x 4``, or on several cards ``2 cards x 2 x 2``."""
    n = facts.get("n_cards", 1)
    each = f"{facts['micro_batch_size']} x {facts['gradient_accumulation_steps']}"
    return f"{n} cards x {each}" if n > 1 else each


def _held(facts: Mapping[str, Any]) -> str:
    """How cards have the layers' weights; checkpoints from before these were split do not say it."""
    n = facts.get("shards", 1)
    return f"split over {n} cards" if n > 1 else "whole"


def _changes(then: Mapping[str, Any], plan: Plan) -> list[str]:
    """What is not as it was, in a line: ``re-planned for Tesla T4: 4 x 4 -> 2 x 8, dtype bf16 -> fp16; ...``."""
    now = plan_facts(plan)
    split = [_split(facts) for facts in (then, now)]
    layers = [" · ".join(f"{n} {name}" for name, n in p["layers"].items()) for p in (then, now)]
    pairs = [
        ("", *split),
        ("dtype ", then["dtype"], now["dtype"]),
        ("layers ", *layers),
        ("weights ", *(_held(facts) for facts in (then, now))),
        ("rows ", then["layout"], now["layout"]),
        ("eval rows ", then["n_eval_rows"], now["n_eval_rows"]),
    ]
    changed = [f"{name}{a} -> {b}" for name, a, b in pairs if a != b]
    other = then["device"] != now["device"]
    if not changed and not other:
        return []
    card = f" for {plan.device.name}" if other else ""
    what = ", ".join(changed) or "as it was"
    return [f"re-planned{card}: {what}; same effective batch {plan.effective_batch_size}"]
