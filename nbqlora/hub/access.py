"""From what the hub said to what a person does: a sentence for each answer, the token's origin, the cache.

A model that is whole in the cache needs no hub: when the hub cannot be reached, or no longer gives the model,
the copy is used, and that is said.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import constants

from nbqlora.core.errors import DataError, ModelError
from nbqlora.core.units import format_bytes
from nbqlora.hub.reach import Answer, Kind, answer_of, ask, endpoint, patience_seconds, read_token
from nbqlora.memory.host import disk_free_bytes

SITE = "https://huggingface.co"
TOKENS = f"{SITE}/settings/tokens"
# The weights' files, best first: one file, or an index that names several. Pickles are no weights here.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# What transformers downloads; a repository may hold the same weights in other forms too.
WEIGHTS_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
KAGGLE_INPUT = Path("/kaggle/input")
# An attached model lies at most this deep, and a data set may hold a million files: look no further.
ATTACHED_DEPTH, ATTACHED_FOLDERS = 5, 200


def token_source(environ: Mapping[str, str] = os.environ) -> str:
    """Where the token comes from that requests carry, in words; "" when there is none."""
    if not read_token():
        return ""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if environ.get(variable, "").strip():
            return f"the variable {variable}"
    if Path(constants.HF_TOKEN_PATH).is_file():
        return f"the login file {constants.HF_TOKEN_PATH}"
    return "Colab's secret HF_TOKEN" if is_colab(environ) else "huggingface_hub"


def is_colab(environ: Mapping[str, str]) -> bool:
    """This is Colab, by the variables that it sets."""
    return "COLAB_RELEASE_TAG" in environ or "COLAB_GPU" in environ


def is_kaggle(environ: Mapping[str, str]) -> bool:
    """This is a Kaggle notebook."""
    return "KAGGLE_KERNEL_RUN_TYPE" in environ


def login_advice(environ: Mapping[str, str] = os.environ) -> str:
    """How to give a token, here."""
    if is_colab(environ):
        return f"add the token as HF_TOKEN under Secrets (the key at the left) and allow this notebook; {TOKENS}"
    if is_kaggle(environ):
        return (
            "add it as HF_TOKEN under Add-ons > Secrets, then run: import os, kaggle_secrets; "
            'os.environ["HF_TOKEN"] = kaggle_secrets.UserSecretsClient().get_secret("HF_TOKEN")'
        )
    return f"set HF_TOKEN, or run huggingface_hub.login(); {TOKENS} makes one"


def network_advice(option: str, environ: Mapping[str, str] = os.environ, attached: Path = KAGGLE_INPUT) -> str:
    """How to reach the hub, or do without it, here.

    Args:
        option: ``model`` or ``data``, which takes a path too.
    """
    if not is_kaggle(environ):
        return f'check the network; files of this machine work without: {option} = "path/to/it"'
    found = attached_models(attached) if option == "model" else ()
    how = "switch Internet on (Settings > Internet), or attach it as input"
    return f'{how} and write {option} = "{found[0] if found else attached / "..."}"'


def attached_models(root: Path = KAGGLE_INPUT) -> tuple[str, ...]:
    """Folders with a model among a Kaggle notebook's inputs, within the first 200 folders."""
    found = []
    for n_seen, (folder, inner, files) in enumerate(os.walk(root)):
        if n_seen >= ATTACHED_FOLDERS:
            break
        if "config.json" in files:
            found.append(folder)
        if len(Path(folder).relative_to(root).parts) >= ATTACHED_DEPTH:
            inner.clear()
    return tuple(sorted(found))


def sentence(name: str, answer: Answer, *, kind: Kind = "model", environ: Mapping[str, str] = os.environ) -> str:
    """What is wrong with ``name`` and what to do; for any answer but ``ok``."""
    source, said = token_source(environ), answer.detail
    what, option, page = ("data set", "data", "datasets/") if kind == "dataset" else ("model", "model", "")
    licence = f"accept its licence at {SITE}/{page}{name}"
    match answer.kind:
        case "gated" if "fine-grained" in said:
            holder = source or "the token"
            return f"{name} is gated, and {holder} may not read such {what}s; allow it in its settings: {TOKENS}"
        case "gated" if source:
            return f"{name} is gated, and {source} has no access; {licence}, with the account of that token"
        case "gated":
            return f"{name} is gated; {licence}, then {login_advice(environ)}"
        case "refused_token":
            return f"the hub refuses the token of {source}{f': {said}' if said else ''}; make a new one: {TOKENS}"
        case "missing":
            private = f"{source} cannot read it" if source else f"it is private: {login_advice(environ)}"
            return f"the hub has no {what} {name}; check the spelling (owner/name), or {private}"
        case "no_file":
            return f"{name} has no config.json on the hub: transformers cannot load it (GGUF files? a bare adapter?)"
        case "bad_name":
            return f"{name!r} is neither a folder here nor a name that a hub takes (owner/name)"
        case "busy":
            return f"{endpoint()} cannot give {name} now: {said}; try again in a minute"
        case "offline":
            return f'{name} is not in the cache, and {said}; unset it, or write {option} = "path/to/it"'
        case "no_hub":
            return f"{endpoint()} answers, but not as a hub does: {said}; a login page or a proxy in between?"
        case "unreachable":
            hub = f"{endpoint()} cannot be reached ({said})"
            return f"{name} is not in the cache, and {hub}; {network_advice(option, environ)}"
    raise ValueError(f"nothing is wrong with {name}")


def cached_copy(name: str) -> Path | None:
    """The folder of a hub model in the cache, if its config and all its weights are there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if has_weights(folder) else None


def has_weights(folder: Path) -> bool:
    """All weights of a model are in its folder."""
    for weights in (folder / file for file in WEIGHTS):
        if weights.is_file():
            return weights.suffix != ".json" or _has_shards(weights)
    return False


def _has_shards(index: Path) -> bool:
    try:
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError):  # cut short while it was copied
        return False
    return all((index.parent / shard).is_file() for shard in shards)


def local_folder(name: str) -> str | None:
    """The folder that ``name`` is, or None when it names a model of the hub.

    Raises:
        ModelError: it names a folder that is not there, or holds no model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        if (path / "adapter_config.json").is_file():
            raise ModelError(f"{name} holds an adapter, not a model; give the model that it was trained on")
        raise ModelError(f"{name} is a folder without config.json; a model's folder has one")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"no such folder: {name}")
    if "/" not in name and get_close_matches(name.lower(), ["demo"], cutoff=0.7):
        raise ModelError(f'there is no model {name}; did you mean "demo"?')
    return None


def download_bytes(name: str) -> int | None:
    """Bytes of a hub model's weights that are not in the cache: 0 once it is whole, None when nobody says."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if cached_copy(name):
        return 0
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        files = HfApi().model_info(name, files_metadata=True, timeout=patience_seconds()).siblings or []
    except Exception as error:
        if answer_of(error) is None:
            raise
        return None
    weights = [f for f in files if WEIGHTS_FILE.fullmatch(f.rfilename)]
    missing = [f for f in weights if not isinstance(try_to_load_from_cache(name, f.rfilename), str)]
    return sum(f.size or 0 for f in missing) if weights else None


def no_room_for(n_bytes: int | None) -> str:
    """Why the hub's cache cannot take a download of that size; "" when it can, or the size is not known."""
    free = disk_free_bytes(constants.HF_HUB_CACHE)
    if not n_bytes or n_bytes <= free:
        return ""
    return (
        f"{format_bytes(n_bytes)} to download, and the disk of {constants.HF_HUB_CACHE} has {format_bytes(free)} free; "
        "set HF_HOME to a folder on another disk, before the libraries are imported"
    )


def find_model(name: str, say: Callable[[str], None]) -> str:
    """A hub model's name when the hub gives it, else the folder of its copy in the cache.

    Raises:
        ModelError: the hub does not give it, and there is no whole copy; said within seconds.
    """
    answer = ask(name)
    if answer.kind == "ok":
        return name
    copy = None if answer.kind == "bad_name" else cached_copy(name)
    if copy is None:
        if answer.kind == "busy":  # waiting helps, and the client does that when it loads
            say(f"the hub cannot give {name} now: {answer.detail}, and is asked again for half a minute")
            return name
        raise ModelError(sentence(name, answer))
    if answer.kind != "offline":
        say(f"using the copy of {name} in the cache: {_short(answer)}")
    return str(copy)


def _short(answer: Answer) -> str:
    words = {"gated": "it is gated", "missing": "the hub has it no longer", "refused_token": "the token is refused"}
    return words.get(answer.kind) or f"{endpoint()}: {answer.detail or answer.kind}"


def check_data_set(name: str) -> None:
    """Raise :class:`DataError` within seconds when neither the hub nor the cache has this data set."""
    answer = ask(name, kind="dataset")
    if answer.kind not in ("ok", "no_file", "busy") and not _has_data_set(name):
        hint = f'; for an object of the notebook write "${name}"' if name.isidentifier() else ""
        raise DataError(sentence(name, answer, kind="dataset") + hint)


def _has_data_set(name: str) -> bool:
    """``datasets`` has something of it in its cache; whether it is enough only ``datasets`` can say."""
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()
    return (cache / name.replace("/", "___")).is_dir()
