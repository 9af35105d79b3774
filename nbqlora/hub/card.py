"""The page of what is published: what it is, how to load it, what it learned from and how, in figures.

It is made of counts, lengths, decisions and losses. Nothing of the rows' text is in it, no path of this machine, and
no note of the plan, which may name one; a licence is the publisher's to add.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nbqlora.core.data_report import DataReport
from nbqlora.core.events import DataEvent
from nbqlora.core.report import Report
from nbqlora.core.units import format_bytes, format_count, format_seconds
from nbqlora.core.version import __version__

Kind = Literal["adapter", "merged", "gguf"]
LIBRARY: Mapping[Kind, str] = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}
RELATION: Mapping[Kind, str] = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
TAGS: Mapping[Kind, tuple[str, ...]] = {
    "adapter": ("lora", "qlora", "nbqlora"),
    "merged": ("qlora", "nbqlora"),
    "gguf": ("gguf", "qlora", "nbqlora"),
}
CURVE = "nbqlora_loss.png"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the page is about.

    Args:
        base: the hub's name of the base model, or another word for it.
        base_is_known: it is the hub's name.
        files: that are published beside the page.
        lora: rank, alpha and targets of the adapter, in words; "" where they are not known.
        has_curve: the figure :data:`CURVE` is published too.
    """

    kind: Kind
    repo_id: str
    base: str
    base_is_known: bool
    files: Sequence[str]
    lora: str = ""
    has_curve: bool = False

    def text(self, report: Report | None) -> str:
        """The page: YAML for the hub, Markdown for people."""
        parts = [self._front(), f"# {self.repo_id.partition('/')[2]}", self._what(), "## How to load it", self._load()]
        if report is not None:
            parts += ["## Data", _table(_data(report)), "## Training", _table(_training(report, self.lora))]
            parts += [f"![loss and memory over the steps]({CURVE})"] if self.has_curve else []
            parts += ["## Versions", _versions(report)]
        return "\n\n".join(parts) + "\n"

    def _front(self) -> str:
        lines = [f"library_name: {LIBRARY[self.kind]}", "pipeline_tag: text-generation"]
        if self.base_is_known:
            lines = [f"base_model: {json.dumps(self.base)}", f"base_model_relation: {RELATION[self.kind]}", *lines]
        return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in TAGS[self.kind]), "---"])

    def _what(self) -> str:
        what = {
            "adapter": "A LoRA adapter for",
            "merged": "A LoRA adapter merged into",
            "gguf": "GGUF files, for llama.cpp, of a LoRA adapter merged into",
        }[self.kind]
        base = f"[{self.base}](https://huggingface.co/{self.base})" if self.base_is_known else self.base
        return f"{what} {base}, trained with nbqlora {__version__}."

    def _load(self) -> str:
        if self.kind == "gguf":
            return "\n".join(
                ["```sh", *(f"llama-cli --hf-repo {self.repo_id} --hf-file {f}" for f in self.files), "```"]
            )
        auto = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{self.repo_id}")'
        if self.kind == "merged":
            model = f'model = AutoModelForCausalLM.from_pretrained("{self.repo_id}", dtype="auto")'
            return _python(auto, "", model, tokenizer)
        base = f'base = AutoModelForCausalLM.from_pretrained("{self.base}", dtype="auto")'
        model = f'model = PeftModel.from_pretrained(base, "{self.repo_id}")'
        return _python("from peft import PeftModel", auto, "", base, model, tokenizer)


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _data(report: Report) -> list[tuple[str, str]]:
    data, plan = report.plan.data, report.plan
    shortest, _, middle, _, longest = data.percentiles
    rows = [
        ("rows", f"{data.n_rows}, as {data.format}" if data.format else f"{data.n_rows}"),
        ("tokens", f"{format_count(data.n_tokens)}, {format_count(data.n_supervised_tokens)} of them learned"),
        ("tokens a row", f"{middle} in the middle, {shortest} to {longest} for nine of ten, {data.max_tokens} at most"),
        ("cut", f"{data.n_truncated} rows at {plan.max_length} tokens"),
        ("left out", f"{sum(data.n_skipped.values())} rows"),
    ]
    looked = _data_report(report)
    rows += [("duplicates", f"{looked.n_duplicates} rows")] if looked is not None else []
    rows += [("evaluation", f"{data.n_eval_rows} rows")] if data.n_eval_rows else []
    return rows


def _data_report(report: Report) -> DataReport | None:
    return next((e.report for e in report.events if isinstance(e, DataEvent)), None)


def _training(report: Report, lora: str) -> list[tuple[str, str]]:
    plan, steps, evals = report.plan, report.steps, report.evals
    rows = [("adapter", lora)] if lora else []
    rows += [(d.name, f"{d.value} ({d.because})" if d.because else d.value) for d in plan.decisions]
    rows.append(("effective batch", f"{plan.effective_batch_size}"))
    if steps:
        rows.append(("steps", f"{steps[-1].step} of {steps[-1].total_steps}"))
        rows.append(("loss", f"{steps[0].loss:.3f} -> {steps[-1].loss:.3f}"))
    if evals:
        rows.append(("evaluation loss", f"{evals[0].loss:.3f} -> {evals[-1].loss:.3f}"))
    peak = f"{format_bytes(report.measured_peak_bytes)}, planned {format_bytes(plan.predicted_peak_bytes)}"
    rows += [("peak memory", peak)] if report.measured_peak_bytes else []
    return [*rows, ("time", f"{format_seconds(report.seconds)} on {plan.device.name}"), ("ended", report.status)]


def _versions(report: Report) -> str:
    return ", ".join(f"{name} {version}" for name, version in (report.versions or {}).items())


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def lora_words(config: Mapping[str, Any]) -> str:
    """Rank, alpha and targets, from an ``adapter_config.json``."""
    targets = config.get("target_modules")
    names = ", ".join(sorted(targets)) if isinstance(targets, list) else str(targets)
    return f"LoRA of rank {config.get('r')}, alpha {config.get('lora_alpha'):g}, on {names}"
