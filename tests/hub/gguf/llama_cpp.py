"""llama.cpp itself, in a process without nbqlora: what it makes of a file.

    python llama_cpp.py < requests.json > answers.json

A request is ``{"file", "prompts", "n", "texts", "chats"}``: for each prompt of ids ``n`` greedy ids, for each text its
ids and what text they are again, for each chat (messages) the ids that are continued.

Two clients: ``xllamacpp`` (a recent llama.cpp, through its server) and ``cyllama`` (an older one, through its library).
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLIENTS = ("xllamacpp", "cyllama")
# The letter A of the byte tokenizer.
PLAIN = 32


def ask(requests: Sequence[dict[str, Any]], client: str = "xllamacpp") -> list[dict[str, Any]]:
    """The answers; a file that llama.cpp refuses has ``{"error": its last lines}``."""
    command = [sys.executable, "-P", __file__, client]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, errors="replace")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    answers = [json.loads(line) for line in lines]
    if len(answers) < len(requests):
        # The process ended at this request; the others get a process of their own.
        rest = requests[len(answers) + 1 :]
        answers.append({"error": (done.stderr or done.stdout)[-2000:]})
        answers += ask(rest, client) if rest else []
    return answers


def _server(request: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["file"]
    params.n_ctx = request.get("context", 512)
    params.cpuparams.n_threads = 1
    params.warmup = False
    params.n_parallel = 1
    params.port = 0
    params.verbosity = 1
    # As exact as transformers in fp32: by default the cache is fp16.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def post(path: str, body: dict[str, Any]) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(server.listening_address + path, data, headers)) as got:
            return json.load(got)

    def go_on(prompt: list[int], n: int, **more: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return dict(post("/completion", {**body, "return_tokens": True, **more}))

    def probabilities(prompt: list[int]) -> dict[int, float]:
        # Taken before the bias, which makes it a token that is text: half a character is not told.
        first, *_ = go_on(prompt, 1, n_probs=1000, logit_bias=[[PLAIN, 1000.0]])["completion_probabilities"]
        return {token["id"]: token["logprob"] for token in first["top_logprobs"]}

    def ids(text: str) -> list[int]:
        return list(post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])

    found = [ids(text) for text in request.get("texts", [])]
    return {
        "greedy": [go_on(prompt, request["n"])["tokens"] for prompt in request.get("prompts", [])],
        "logprobs": [probabilities(prompt) for prompt in request.get("prompts", [])],
        "ids": found,
        "back": [post("/detokenize", {"tokens": tokens})["content"] for tokens in found],
        "chats": [ids(post("/apply-template", {"messages": chat})["prompt"]) for chat in request.get("chats", [])],
    }


def _library(request: dict[str, Any]) -> dict[str, Any]:
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    model = llama_cpp.LlamaModel(request["file"], llama_cpp.LlamaModelParams())
    vocabulary = model.get_vocab()

    def go_on(prompt: list[int], n: int) -> list[int]:
        settings = llama_cpp.LlamaContextParams()
        settings.n_ctx = request.get("context", 512)
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = 0
        settings.flash_attn_type = 0
        context = llama_cpp.LlamaContext(model, settings)
        sampler = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
        sampler.add_greedy()
        found: list[int] = []
        batch = prompt
        for _ in range(n):
            context.decode(llama_cpp.llama_batch_get_one(batch, len(prompt) + len(found) - len(batch)))
            found.append(sampler.sample(context, -1))
            batch = found[-1:]
        context.close()
        return found

    return {
        "greedy": [go_on(prompt, request["n"]) for prompt in request.get("prompts", [])],
        "ids": [list(vocabulary.tokenize(text, True, True)) for text in request.get("texts", [])],
    }


def main() -> None:
    answer = {"xllamacpp": _server, "cyllama": _library}[sys.argv[1]]
    for request in json.loads(sys.stdin.read()):
        try:
            print(json.dumps(answer(request)), flush=True)
        except (RuntimeError, ValueError, OSError) as error:
            print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    assert Path(__file__).exists()
    main()
