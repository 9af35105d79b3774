"""How rows are laid out: packs, end to end, or padded; decided by a probe, twice.

Before anything is downloaded a miniature of the family is asked, so that a plan can say it. Once the model is
loaded it is asked itself, with the rows, the kernels and the arithmetic of the run: what it says counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.specs import BatchLayout
from nbqlora.engine.loaded import LoadedModel, autocast
from nbqlora.engine.packing import PROBE_TOKENS, PackingProbe, probe_packing
from nbqlora.hub.miniature import VOCAB, miniature
from nbqlora.train.batch import end_to_end

NOT_PROBED = "this family has no miniature to probe; the model is asked once it is loaded"


def choose_layout(config: FinetuneConfig, location: str) -> tuple[BatchLayout, str]:
    """The layout that a plan states, and why.

    Args:
        location: the folder or hub id of the model; its config is read, no weights.

    Raises:
        ConfigError: a layout that was asked for does not keep documents apart in this family.
    """
    if config.packing is not True and config.padding_free is False:
        return BatchLayout.PADDED, "padding_free = false"
    found = _probe_family(location, config.trust_remote_code)
    if found is None:
        return _wanted(config), NOT_PROBED
    return settle(config, found)


def settle(config: FinetuneConfig, found: PackingProbe) -> tuple[BatchLayout, str]:
    """What a probe's answer means for this run. Raises :class:`ConfigError` as :func:`choose_layout`."""
    if found.exact:
        return _wanted(config), found.because
    asked = next((name for name in ("packing", "padding_free") if getattr(config, name) is True), "")
    if asked:
        hint = 'leave it out, or write packing = "auto": rows are padded then'
        raise ConfigError([Problem(key=asked, message=found.because, hint=hint)])
    return BatchLayout.PADDED, found.because


def probe_loaded(loaded: LoadedModel, rows: Sequence[Sequence[int]]) -> PackingProbe:
    """Ask the loaded model.

    Args:
        rows: token ids of a few rows of the run; their first tokens make the probe's documents.
    """
    return probe_packing(
        loaded.model,
        documents(rows),
        partial(end_to_end, pad_token_id=loaded.tokenizer.pad_token_id or 0, device=loaded.device),
        context=partial(autocast, loaded),
        dtype=loaded.dtype,
    )


def documents(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Documents of the probe's lengths, from the rows' tokens one after another, over and over if they are few."""
    tokens = [token for row in rows for token in row]
    endless = tokens * (1 + sum(PROBE_TOKENS) // len(tokens))
    found, at = [], 0
    for length in PROBE_TOKENS:
        found.append(endless[at : at + length])
        at += length
    return found


def _wanted(config: FinetuneConfig) -> BatchLayout:
    return BatchLayout.PACKED if config.packing in (True, "auto") else BatchLayout.JOINED


def _probe_family(location: str, trust_remote_code: bool) -> PackingProbe | None:
    from transformers import AutoConfig

    small = miniature(
        AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
    )
    if small is None:
        return None
    numbers = torch.Generator().manual_seed(0)
    tokens: list[Any] = torch.randint(1, VOCAB, (sum(PROBE_TOKENS),), generator=numbers).tolist()
    collate = partial(end_to_end, pad_token_id=0, device=torch.device("cpu"))
    return probe_packing(small, documents([tokens]), collate, context=torch.enable_grad, dtype=torch.float32)
