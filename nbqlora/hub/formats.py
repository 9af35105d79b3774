"""Which of a model's files would be read, before a library reads them: safetensors and JSON, and no pickle.

transformers takes ``model.safetensors`` where it is there, and is told to take nothing else. Four ways lead to a pickle
all the same (5.15 to 5.23): a model that has only ``pytorch_model.bin`` (refused there in words that tell people to
switch the protection off, after a request to a service that converts it), an index that lists such a file as a part,
``transformers_weights`` in ``config.json``, and an adapter beside the model, which is put on it unasked. torch reads
pickles with a restricted loader by now; here they are not opened.

Of a model on the hub the same small files are looked at: three requests, or two for what is in the cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import constants

from nbqlora.core.errors import ModelError
from nbqlora.hub.manifest import CONFIG as ADAPTER_CONFIG
from nbqlora.hub.manifest import PICKLE as ADAPTER_PICKLE
from nbqlora.hub.manifest import WEIGHTS as ADAPTER_WEIGHTS
from nbqlora.hub.reach import answer_of, patience_seconds
from nbqlora.hub.stored import INDEX, SINGLE

PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SAFE = (".safetensors", ".safetensors.index.json")


def check_formats(name: str, location: str) -> None:
    """Raise :class:`ModelError` when loading this model would open a pickle.

    Args:
        name: as the user gave it.
        location: a folder, or a hub id; what the hub does not answer is left to the loading itself.
    """
    files: _Files = _Folder(Path(location)) if Path(location).is_dir() else _Hub(location)
    explicit = files.read("config.json").get("transformers_weights")
    if explicit is not None and not str(explicit).endswith(SAFE):
        raise ModelError(f"{name}: its config.json asks for {explicit}, which is a pickle and is never opened; {_HOW}")
    if files.has(ADAPTER_CONFIG) and files.has(ADAPTER_WEIGHTS) is False and files.has(ADAPTER_PICKLE):
        raise ModelError(
            f"{name} has an adapter beside the model whose weights are a pickle ({ADAPTER_PICKLE}), which is never "
            "opened; use a copy of the model without the adapter's files"
        )
    listed = files.read(INDEX).get("weight_map")
    odd = sorted({str(part) for part in listed.values()} if isinstance(listed, dict) else ())
    odd = [part for part in odd if not part.endswith(".safetensors")]
    if odd:
        raise ModelError(f"{name}: {INDEX} lists {odd[0]}, which is no safetensors file and is never opened; {_HOW}")
    if explicit is None and listed is None and files.has(SINGLE) is False:
        pickled = next((file for file in PICKLED if files.has(file)), "")
        if pickled:
            raise ModelError(pickled_only(name, pickled))


_HOW = "use a copy in safetensors"


def pickled_only(name: str, file: str) -> str:
    """A line for a model without safetensors."""
    how = f'AutoModelForCausalLM.from_pretrained("{name}").save_pretrained("a folder")'
    return (
        f"{name} has its weights only as a pickle ({file}), which can hold code and is never opened; choose a model in "
        f'safetensors, or, where you trust its author, convert it once with {how} and write model = "a folder"'
    )


class _Files(Protocol):
    def has(self, name: str) -> bool | None: ...

    def read(self, name: str) -> dict[str, Any]: ...


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, name: str) -> bool:
        return (self._folder / name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        return _json(self._folder / name) if self.has(name) else {}


class _Hub:
    """The files of a repository; what is in the cache is not asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def has(self, name: str) -> bool | None:
        """None when nobody says."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

        if isinstance(try_to_load_from_cache(self._name, name), str):
            return True
        if constants.HF_HUB_OFFLINE:
            return None
        try:
            get_hf_file_metadata(hf_hub_url(self._name, name), timeout=patience_seconds())
        except Exception as error:
            answer = answer_of(error)
            if answer is None:
                raise
            return False if answer.kind == "no_file" else None
        return True

    def read(self, name: str) -> dict[str, Any]:
        from huggingface_hub import hf_hub_download

        if not self.has(name):
            return {}
        try:
            return _json(Path(hf_hub_download(self._name, name)))
        except Exception as error:
            if answer_of(error) is None:
                raise
            return {}


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: it was cut, or copied badly") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds no object")
    return value
