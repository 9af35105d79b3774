"""A loaded model made ready to train: fused layers, loss, policies; for a run, or for a loop of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbqlora.core.config import FinetuneConfig, validate
from nbqlora.core.plan import Plan, Replacement
from nbqlora.core.request import CellRequest
from nbqlora.core.specs import DataStats
from nbqlora.engine.head import choose_loss
from nbqlora.engine.host_embedding import embedding_is_on_host, embedding_to_host
from nbqlora.engine.loaded import LoadedModel, autocast
from nbqlora.engine.optimize import optimize
from nbqlora.engine.quiet import quiet_libraries
from nbqlora.hub.inspect import read_spec
from nbqlora.hub.load import load as load_files
from nbqlora.memory.device import device_spec
from nbqlora.planner import make_plan
from nbqlora.run.look import place_of, tokenizer_of
from nbqlora.run.tables import table_fields


def prepare(loaded: LoadedModel, plan: Plan) -> tuple[Replacement, ...]:
    """Put the fused layers on, choose the loss, set each layer's policy.

    Returns:
        Everything that was changed on the model, and what was looked at and left.
    """
    loaded.release()
    fused = optimize(loaded.model, plan)
    if plan.offload_embedding and not embedding_is_on_host(loaded.model):
        fused = (*fused, embedding_to_host(loaded.model))
    loss, chosen = choose_loss(
        loaded.model, plan.model.head, plan.loss_chunk_tokens, loaded.device, autocast(loaded), loaded.dtype
    )
    loaded.plan, loaded.loss = plan, loss
    return (*loaded.replacements, *fused, chosen, *told_of_the_step(loaded))


def told_of_the_step(loaded: LoadedModel) -> tuple[Replacement, ...]:
    """Whether steps will be captured, or why not: the loaded model's answer, where the plan only expected one."""
    if loaded.device.type != "cuda":
        return ()
    because, old = loaded.micro_step().eager_because, "launched kernel by kernel"
    if because:
        return (Replacement(path="step", old=old, new="", because=because),)
    return (Replacement(path="step", old=old, new="captured", because="a replay does not wait for the host"),)


def load_to_train(model: str, options: dict[str, Any]) -> LoadedModel:
    """A model for a loop of the user's own, planned for rows of ``max_length`` tokens, all of them learned.

    Raises:
        ConfigError, DoesNotFitError, ModelError: as a run.
    """
    asked = {"model": model, "data": [], **options}
    if not asked.keys() & {"gradient_accumulation_steps", "effective_batch_size"}:
        asked["gradient_accumulation_steps"] = 1
    config = validate(CellRequest(options=asked), table_fields=table_fields)
    with quiet_libraries(progress_bars=True):
        location = place_of(config, lambda line: None)
        spec = read_spec(config.model, location, trust_remote_code=config.trust_remote_code)
        plan = make_plan(
            config, spec, device_spec("."), _full_rows(config), output_dir=str(Path(config.output_dir or "."))
        )
        loaded = load_files(config, plan, location, tokenizer_of(config, location))
        loaded.replacements = prepare(loaded, plan)
    return loaded


def _full_rows(config: FinetuneConfig) -> DataStats:
    """One step's rows, all of them full: what a loop will bring is not known."""
    rows = config.per_device_train_batch_size or config.effective_batch_size or 1
    rows *= config.gradient_accumulation_steps or 1
    return DataStats.full(rows, config.max_length, source="rows of a loop")
