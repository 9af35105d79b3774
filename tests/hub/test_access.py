"""From an answer of the hub to a sentence that helps, and the cache that stands in for the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from nbqlora.core.errors import DataError, ModelError
from nbqlora.hub import access
from nbqlora.hub.inspect import locate
from nbqlora.hub.reach import Answer, endpoint
from tests.hub.hub_server import BAD_TOKEN, FINE_GRAINED, GOOD_TOKEN, closed_address

COLAB, KAGGLE = {"COLAB_RELEASE_TAG": "x"}, {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}
UseHub = Callable[[str], None]


@pytest.mark.parametrize(
    ("answer", "environ", "said"),
    [
        (
            Answer(kind="gated"),
            {},
            "org/m is gated; accept its licence at https://huggingface.co/org/m, then set HF_TOKEN, or run "
            "huggingface_hub.login(); https://huggingface.co/settings/tokens makes one",
        ),
        (
            Answer(kind="gated"),
            {"HF_TOKEN": GOOD_TOKEN},
            "org/m is gated, and the variable HF_TOKEN has no access; accept its licence at "
            "https://huggingface.co/org/m, with the account of that token",
        ),
        (
            Answer(kind="gated", detail=FINE_GRAINED),
            {"HF_TOKEN": GOOD_TOKEN},
            "org/m is gated, and the variable HF_TOKEN may not read such models; allow it in its settings: "
            "https://huggingface.co/settings/tokens",
        ),
        (
            Answer(kind="refused_token"),
            {"HUGGING_FACE_HUB_TOKEN": BAD_TOKEN},
            "the hub refuses the token of the variable HUGGING_FACE_HUB_TOKEN; make a new one: "
            "https://huggingface.co/settings/tokens",
        ),
        (
            Answer(kind="missing"),
            {},
            "the hub has no model org/m; check the spelling (owner/name), or it is private: set HF_TOKEN, or run "
            "huggingface_hub.login(); https://huggingface.co/settings/tokens makes one",
        ),
        (
            Answer(kind="missing"),
            {"HF_TOKEN": GOOD_TOKEN},
            "the hub has no model org/m; check the spelling (owner/name), or the variable HF_TOKEN cannot read it",
        ),
        (
            Answer(kind="no_file"),
            {},
            "org/m has no config.json on the hub: transformers cannot load it (GGUF files? a bare adapter?)",
        ),
        (Answer(kind="bad_name"), {}, "'org/m' is neither a folder here nor a name that a hub takes (owner/name)"),
        (
            Answer(kind="busy", detail="it answers 503"),
            {},
            "https://huggingface.co cannot give org/m now: it answers 503; try again in a minute",
        ),
        (
            Answer(kind="offline", detail="HF_HUB_OFFLINE = 1 keeps the libraries off it"),
            {},
            "org/m is not in the cache, and HF_HUB_OFFLINE = 1 keeps the libraries off it; unset it, or write "
            'model = "path/to/it"',
        ),
        (
            Answer(kind="no_hub", detail="it names no commit"),
            {},
            "https://huggingface.co answers, but not as a hub does: it names no commit; a login page or a proxy in "
            "between?",
        ),
        (
            Answer(kind="unreachable", detail="its name is not known"),
            {},
            "org/m is not in the cache, and https://huggingface.co cannot be reached (its name is not known); check "
            'the network; files of this machine work without: model = "path/to/it"',
        ),
        (
            Answer(kind="unreachable", detail="its name is not known"),
            KAGGLE,
            "org/m is not in the cache, and https://huggingface.co cannot be reached (its name is not known); switch "
            'Internet on (Settings > Internet), or attach it as input and write model = "/kaggle/input/..."',
        ),
    ],
)
def test_each_answer_becomes_what_to_do(
    use_hub: UseHub, monkeypatch: pytest.MonkeyPatch, answer: Answer, environ: Mapping[str, str], said: str
) -> None:
    use_hub("https://huggingface.co")
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    assert access.sentence("org/m", answer, environ=environ) == said


def test_how_to_log_in_depends_on_the_place() -> None:
    assert "as HF_TOKEN under Secrets (the key at the left)" in access.login_advice(COLAB)
    assert 'os.environ["HF_TOKEN"] = kaggle_secrets.UserSecretsClient()' in access.login_advice(KAGGLE)


def test_the_origin_of_a_token_is_found_and_the_token_is_not_in_it(
    use_hub: UseHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub("https://huggingface.co")
    assert access.token_source() == ""
    login = tmp_path / "hf/token"
    login.parent.mkdir()
    login.write_text(GOOD_TOKEN)
    assert access.token_source() == f"the login file {login}"
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", GOOD_TOKEN)
    assert access.token_source() == "the variable HUGGING_FACE_HUB_TOKEN"
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    assert access.token_source() == "the variable HF_TOKEN"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert access.token_source() == ""


def test_a_token_that_is_in_none_of_the_known_places_is_colabs(
    use_hub: UseHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub("https://huggingface.co")
    monkeypatch.setattr(access, "read_token", lambda: GOOD_TOKEN)
    assert access.token_source(COLAB) == "Colab's secret HF_TOKEN"


def test_a_password_in_the_endpoint_is_not_shown(use_hub: UseHub) -> None:
    use_hub("https://me:secret@mirror.example:8443/hub")
    assert endpoint() == "https://mirror.example:8443/hub"


def test_models_attached_on_kaggle_are_named(tmp_path: Path) -> None:
    deep = tmp_path / "llama/transformers/1b/2"
    too_deep = tmp_path / "data/a/b/c/d/e"
    for folder in (deep, too_deep):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert access.attached_models(tmp_path) == (str(deep),)
    advice = access.network_advice("model", KAGGLE, tmp_path)
    assert advice.endswith(f'attach it as input and write model = "{deep}"')
    assert access.network_advice("data", KAGGLE, tmp_path).endswith(f'write data = "{tmp_path}/..."')


def test_a_name_that_is_no_model_is_refused_without_asking_the_hub(
    use_hub: UseHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(closed_address())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    for name, said in {
        "empty": "empty is a folder without config.json; a model's folder has one",
        "adapter": "adapter holds an adapter, not a model; give the model that it was trained on",
        "./nowhere": "no such folder: ./nowhere",
        "a/b/c": "no such folder: a/b/c",
        "Demo": 'there is no model Demo; did you mean "demo"?',
        "two words": "'two words' is neither a folder here nor a name that a hub takes (owner/name)",
    }.items():
        with pytest.raises(ModelError) as caught:
            locate(name)
        assert str(caught.value) == said


def test_a_folder_is_a_model_without_a_hub(use_hub: UseHub, tiny_folder: Path) -> None:
    use_hub(closed_address())
    assert locate(str(tiny_folder)) == str(tiny_folder)


def test_the_hub_gives_a_model_by_its_name(hub: str) -> None:
    assert locate("org/open") == "org/open"
    with pytest.raises(
        ModelError, match=r"^org/gated is gated; accept its licence at https://huggingface.co/org/gated"
    ):
        locate("org/gated")


def test_a_busy_hub_is_left_to_the_client_that_waits(hub: str) -> None:
    assert locate("org/busy") == "org/busy"


def cache_from(tiny_folder: Path, *, without: str = "") -> None:
    """Fill the cache through the real client."""
    for file in tiny_folder.iterdir():
        if file.name != without:
            hf_hub_download("org/tiny", file.name)


def test_a_whole_copy_in_the_cache_stands_in_for_the_hub(hub: str, use_hub: UseHub, tiny_folder: Path) -> None:
    cache_from(tiny_folder)
    closed = closed_address()
    use_hub(closed)
    said: list[str] = []
    folder = Path(locate("org/tiny", said.append))
    assert said == [f"using the copy of org/tiny in the cache: {closed}: it refuses the connection"]
    assert {f.name for f in folder.iterdir()} == {f.name for f in tiny_folder.iterdir()}
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(folder).model_type == "llama"


def test_a_copy_without_its_weights_is_none(hub: str, use_hub: UseHub, tiny_folder: Path) -> None:
    cache_from(tiny_folder, without="model.safetensors")
    use_hub(closed_address())
    with pytest.raises(ModelError, match=r"^org/tiny is not in the cache, and http://127.*it refuses the connection"):
        locate("org/tiny")


def test_a_copy_in_the_cache_is_used_in_silence_where_the_network_is_forbidden(
    hub: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_from(tiny_folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said: list[str] = []
    assert "models--org--tiny" in locate("org/tiny", said.append)
    assert said == []


def test_all_shards_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.1", "b": "x.2"}}))
    (tmp_path / "x.1").touch()
    assert not access.has_weights(tmp_path)
    (tmp_path / "x.2").touch()
    assert access.has_weights(tmp_path)


def test_only_what_transformers_loads_and_the_cache_lacks_is_to_be_downloaded(hub: str) -> None:
    assert access.download_bytes("org/open") == 7000
    hf_hub_download("org/open", "model-00001-of-00002.safetensors")
    assert access.download_bytes("org/open") == 3000


def test_nobody_knows_the_size_of_a_download_without_a_hub(use_hub: UseHub) -> None:
    use_hub(closed_address())
    assert access.download_bytes("org/open") is None


def test_a_download_larger_than_its_disk_is_said(use_hub: UseHub, tmp_path: Path) -> None:
    use_hub("https://huggingface.co")
    free = shutil.disk_usage(tmp_path).free
    assert access.no_room_for(None) == access.no_room_for(free // 2) == ""
    said = access.no_room_for(free * 2)
    assert "to download, and the disk of" in said and "set HF_HOME to a folder on another disk" in said


@pytest.mark.parametrize("name", ["org/open", "org/gguf", "org/busy"])
def test_a_data_set_that_the_hub_may_give_passes(hub: str, name: str) -> None:
    access.check_data_set(name)


def test_a_data_set_that_nobody_has_is_an_error_that_speaks_of_data(hub: str, use_hub: UseHub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^the hub has no data set org/missing; check the spelling"):
        access.check_data_set("org/missing")
    with pytest.raises(DataError, match=r"accept its licence at https://huggingface.co/datasets/org/gated, then"):
        access.check_data_set("org/gated")
    use_hub(closed_address())
    with pytest.raises(DataError, match=r"it refuses the connection\).*: data = \"path/to/it\""):
        access.check_data_set("org/open")
    (tmp_path / "hf/datasets/org___open").mkdir(parents=True)
    access.check_data_set("org/open")
