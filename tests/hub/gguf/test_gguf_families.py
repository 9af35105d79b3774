"""Every row of the table of families: llama.cpp loads the file and computes what transformers computes.

Weights are fp32 and random, so that all logits can be compared: a rotary angle, a norm or a factor that is wrong moves
them by far more than 1e-4 of their spread. Gemma's may be off by more: llama.cpp looks its GELU up in a table of fp16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from nbqlora.hub.gguf import ExportedGguf, export_gguf
from nbqlora.hub.gguf.families import FAMILIES
from tests.hub.gguf.llama_cpp import CLIENTS, ask
from tests.hub.gguf.stream import FolderStream
from tests.hub.gguf.tiny_models import CONTEXTS, MODELS, N_GREEDY, logits_along, make, prompts
from tests.quick import quick_runs
from tests.tiny import make_tokenizer

Exports = Mapping[str, tuple[Any, ExportedGguf]]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    folder = tmp_path_factory.mktemp("families")
    made = {}
    for i, (name, (family, changes)) in enumerate(MODELS.items()):
        model = make(family, changes)
        model.save_pretrained(folder / f"{i}")
        make_tokenizer().save_pretrained(folder / f"{i}")
        made[name] = (model, export_gguf(FolderStream(folder / f"{i}"), folder / f"{i}.gguf", "F32"))
    return made


@pytest.fixture(scope="module")
def answers(exports: Exports) -> Mapping[str, Mapping[str, Any]]:
    requests = [
        {"file": done.path, "prompts": prompts(), "n": N_GREEDY, "context": CONTEXTS.get(name, 512)}
        for name, (_, done) in exports.items()
    ]
    return {client: dict(zip(exports, ask(requests, client), strict=True)) for client in CLIENTS}


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_computes(
    name: str, exports: Exports, answers: Mapping[str, Mapping[str, Any]]
) -> None:
    recent = answers["xllamacpp"][name]
    assert recent.get("error", "") == answers["cyllama"][name].get("error", "") == ""
    assert recent["greedy"] == answers["cyllama"][name]["greedy"]
    texts = [[*prompt, *found] for prompt, found in zip(prompts(), recent["greedy"], strict=True)]
    along = logits_along(exports[name][0], texts)
    for prompt, found, logits, given in zip(prompts(), recent["greedy"], along, recent["logprobs"], strict=True):
        assert len(found) == N_GREEDY
        # Each token is the most likely one after those before it: transformers would have given the same, one by one.
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == found
        assert _off(given, logits[len(prompt) - 1]) < (3e-3 if "gemma" in name else 1e-4)


def test_there_is_a_model_of_every_family() -> None:
    assert {family for family, _ in MODELS.values()} == set(FAMILIES)


def test_what_llama_cpp_does_otherwise_is_said(exports: Exports) -> None:
    windows = (
        "llama.cpp has no sliding window for this family: the file's context is 130 tokens, up to which the window "
        "changes nothing"
    )
    assert exports["mistral, window"][1].notes == (windows,)
    assert exports["mistral"][1].notes == exports["gemma3_text"][1].notes == exports["olmo3"][1].notes == ()
    assert exports["phi3, LongRoPE"][1].notes == (
        "give llama.cpp a context of at most 256 tokens for short texts: above it takes LongRoPE's long factors from "
        "the first token on, transformers only once a text is longer",
    )


def _off(given: Mapping[str, float], expected: torch.Tensor) -> float:
    """The largest difference of two sets of logits, each up to a constant, in units of their spread."""
    # A token that llama.cpp must not give has no probability that could be told.
    known = {int(i): value for i, value in given.items() if value > -1e9}
    assert len(known) >= len(expected) - 1
    found, wanted = torch.tensor(list(known.values())), expected[list(known)]
    return float(((found - found.mean()) - (wanted - wanted.mean())).abs().max() / wanted.std())
