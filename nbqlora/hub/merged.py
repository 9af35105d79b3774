"""Base and adapter as one model's tensors, a few rows at a time: ``W + scale * B A`` in fp32.

Which tensor of the checkpoint an adapter's module means is found by name, and everything is settled before the first
byte is read: a module that has no tensor, shapes that do not fit and tensors of a kind that cannot be merged are
errors here. Names and order stay those of the base, so whatever loads the base loads the result.

A tied head is a tensor of its own as soon as the adapter changes the embedding or the head alone: merged into the one
matrix that both share, it would change both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nbqlora.core.errors import ModelError
from nbqlora.hub.base_weights import OriginalWeights
from nbqlora.hub.lora_files import AdapterFiles, Delta
from nbqlora.hub.stored import Stored


@dataclass(frozen=True, kw_only=True)
class Change:
    """What happens to one tensor.

    Args:
        source: the base's tensor that it begins as.
        replaced: begins as this one instead.
        deltas: added in this order.
    """

    source: str
    replaced: Stored | None = None
    deltas: tuple[Delta, ...] = ()


class MergedModel:
    """A ``WeightStream`` (see ``hub.weights``) of a base with adapters merged in.

    Args:
        folder: the base's.
        base: its tensors.
        adapters: merged in this order; none is the base itself.
        piece_bytes: fp32 bytes of the rows that are worked on at once.

    Attributes:
        unties: the head became a tensor of its own.

    Raises:
        ModelError: an adapter does not fit the base; nothing was read but headers.
    """

    def __init__(
        self, folder: Path, base: OriginalWeights, adapters: Sequence[AdapterFiles], *, piece_bytes: int
    ) -> None:
        self.folder, self._base, self._piece_bytes = folder, base, piece_bytes
        self.config: Mapping[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        self.tokenizer_folder = next(
            (a.folder for a in reversed(adapters) if _brings_tokenizer(a.folder, folder)), folder
        )
        paths = dict.fromkeys(p for a in adapters for p in (*(f"{d}.weight" for d in a.deltas), *a.replaced))
        names = name_of_each(tuple(paths), base.names)
        self._changes = {name: _change(path, name, adapters) for path, name in names.items()}
        self.unties = self._untie(names, adapters)
        self.names = (*base.names, *(name for name in self._changes if name not in base.names))
        for name, change in self._changes.items():
            self._check(name, change)

    @property
    def n_changed(self) -> int:
        """Tensors that are not the base's."""
        return len(self._changes)

    def shape(self, name: str) -> tuple[int, ...]:
        """See ``WeightStream``."""
        return self._base.shape(self._source(name))

    def dtype(self, name: str) -> torch.dtype:
        """See ``WeightStream``."""
        return self._base.dtype(self._source(name))

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """See ``WeightStream``. Raises :class:`ModelError` when a file cannot be read any more."""
        change = self._changes.get(name, Change(source=name))
        factors = [(d, *d.factors(self._base.device)) for d in change.deltas]
        for first, last in self._steps(name):
            rows = self._rows(change, first, last)
            for delta, left, right in factors:
                rows.addmm_(left[first:last], right)
                if delta.magnitude is not None:
                    # DoRA: each output's row has the length that was trained, whatever its direction became.
                    length = delta.magnitude.read(first, last).to(rows.device, torch.float32)
                    rows.mul_((length / torch.linalg.vector_norm(rows, dim=1))[:, None])
            yield rows.cpu()
        self._base.done(change.source)

    def pieces_as(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """:meth:`pieces` for a writer of this dtype: what is stored so and not changed comes as it is, uncast."""
        if name in self._changes or not self._base.is_stored_as(name, dtype):
            return self.pieces(name)
        return (self._base.stored[name].read(first, last) for first, last in self._steps(name))

    def whole(self, name: str) -> torch.Tensor:
        """A tensor in fp32, in one."""
        if not self.shape(name):
            return next(self.pieces(name))
        found = torch.empty(self.shape(name))
        for (first, last), piece in zip(self._steps(name), self.pieces(name), strict=True):
            found[first:last] = piece
        return found

    def some_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """A few rows of a tensor that no adapter changes, in fp32."""
        return torch.cat([self._base.rows(self._source(name), row, row + 1).cpu() for row in rows])

    def _steps(self, name: str) -> Iterator[tuple[int, int]]:
        """Rows from, up to; of a tensor without rows, its one element."""
        shape, source = self.shape(name), self._source(name)
        n_rows, unit = shape[0] if shape else 1, self._base.row_unit(source)
        step = max(1, self._piece_bytes // (4 * max(1, math.prod(shape[1:]))) // unit) * unit
        yield from ((first, min(first + step, n_rows)) for first in range(0, n_rows, step))

    def _rows(self, change: Change, first: int, last: int) -> torch.Tensor:
        if change.replaced is not None:
            return change.replaced.read(first, last).to(self._base.device, torch.float32)
        return self._base.rows(change.source, first, last)

    def _source(self, name: str) -> str:
        return self._changes[name].source if name in self._changes else name

    def _untie(self, names: Mapping[str, str], adapters: Sequence[AdapterFiles]) -> bool:
        """Give a tied head a tensor of its own where the adapter parts it from the embedding."""
        tied = bool(text_config(self.config).get("tie_word_embeddings", _tied_by_default(self.folder)))
        embedding, head = _embedding_and_head(self._base.names)
        if not tied or embedding is None or head in self._base.names:
            return False
        if not {embedding, head} & set(names.values()):
            return False
        changed = self._changes.pop(head, None) is not None
        self._changes[head] = _change(head, embedding, adapters) if changed else Change(source=embedding)
        return True

    def _check(self, name: str, change: Change) -> None:
        if change.source not in self._base.names:
            raise ModelError(f"the adapter changes {name}, which the base's files do not have: another model?")
        shape = self._base.shape(change.source)
        if change.replaced is not None and change.replaced.shape != shape:
            raise ModelError(f"the adapter has {change.replaced.shape} for {name}, and the base {shape}; resized "
                             "embeddings cannot be merged")  # fmt: skip
        for delta in change.deltas:
            if delta.shape != shape:
                raise ModelError(f"the adapter is for {delta.shape}, and {name} of the base is {shape}: another model?")


def _change(path: str, name: str, adapters: Sequence[AdapterFiles]) -> Change:
    module = path.removesuffix(".weight")
    replaced = [a.replaced[path] for a in adapters if path in a.replaced]
    deltas = tuple(a.deltas[module] for a in adapters if module in a.deltas)
    if len(deltas) > 1 and any(d.magnitude is not None for d in deltas):
        raise ModelError(
            f"{module} has DoRA beside another adapter: their sum is not defined; merge one after the other"
        )
    if len(replaced) > 1:
        raise ModelError(f"{len(replaced)} adapters bring {path} whole; only one can")
    return Change(source=name, replaced=replaced[0] if replaced else None, deltas=deltas)


def name_of_each(paths: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The checkpoint's name of each parameter's path.

    The same name; or, since some checkpoints hold a model inside another one or without its outermost name, the one
    name of which one is the other's end.

    Raises:
        ModelError: there is none, or more than one.
    """
    there = set(names)
    _, head = _embedding_and_head(names)
    found, missing = {}, []
    for path in paths:
        fits = [path] if path in there else [n for n in names if n.endswith(f".{path}") or path.endswith(f".{n}")]
        if len(fits) == 1:
            found[path] = fits[0]
        elif path == head and not fits:  # a tied head: not in the files
            found[path] = path
        else:
            missing.append(path)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"the adapter changes {missing[0]}{more}, which the base's files do not have: another model?")
    return found


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's part of a config."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, Mapping) else config


def _embedding_and_head(names: Sequence[str]) -> tuple[str | None, str]:
    """Names of the input embedding, if it goes by a usual one, and of the head."""
    usual = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
    embedding = next((n for n in names if n.endswith(usual)), None)
    return embedding, "lm_head.weight"


def _tied_by_default(folder: Path) -> bool:
    """What the family's config says where the file says nothing."""
    from transformers import AutoConfig

    return bool(getattr(AutoConfig.from_pretrained(folder).get_text_config(), "tie_word_embeddings", False))


def _brings_tokenizer(adapter: Path, base: Path) -> bool:
    """The adapter's tokenizer is another one than the base's: more tokens, or another chat template.

    If it is the same, the base's own files are better: what transformers 5.23 saves of a Llama 2 tokenizer no longer
    says how it treats spaces.
    """
    if not (adapter / "tokenizer_config.json").is_file():
        return False
    return not (base / "tokenizer_config.json").is_file() or _tokenizer_facts(adapter) != _tokenizer_facts(base)


def _tokenizer_facts(folder: Path) -> tuple[Any, Any]:
    """Its added tokens, and its chat template."""
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    template = folder / "chat_template.jinja"
    file = folder / "tokenizer.json"
    added = json.loads(file.read_text("utf-8")).get("added_tokens", []) if file.is_file() else None
    tokens = None if added is None else sorted((each["id"], each["content"]) for each in added)
    return tokens, template.read_text("utf-8") if template.is_file() else settings.get("chat_template")
