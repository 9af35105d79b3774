"""A folder that disappears with its session is said before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbqlora.core.errors import ConfigError
from nbqlora.run.places import check_drive, default_output_dir, ephemeral_note, rooms, stays
from tests.mounts import mounted

COLAB, KAGGLE = {"COLAB_RELEASE_TAG": "release-colab"}, {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}


@pytest.mark.parametrize(
    ("folder", "environ", "note"),
    [
        ("/home/me/runs/a", {}, ""),
        ("/content/runs/a", COLAB, 'mount Drive and write output_dir = "/content/drive/MyDrive/a" to keep it'),
        ("/content/drive/MyDrive/a", COLAB, ""),
        ("/kaggle/working/runs/a", KAGGLE, "Save Version > Save & Run All keeps it"),
        ("/kaggle/working/runs/a", {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, ""),
        ("/tmp/a", {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, "only /kaggle/working is kept"),
        ("/home/jovyan/runs/a", {"BINDER_SERVICE_HOST": "1"}, "download the folder adapter when the run is done"),
    ],
)
def test_ephemeral_note(folder, environ, note):
    said = ephemeral_note(Path(folder), environ)
    assert said.endswith(note)
    assert bool(said) == bool(note)
    assert not said or said.startswith(f"{folder} disappears with this session")


def test_default_output_dir():
    assert default_output_dir("run1") == "runs/run1"


def test_the_note_is_in_the_plan(tiny_folder, tiny_rows, monkeypatch):
    import nbqlora

    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    plan = nbqlora.plan(model=str(tiny_folder), data=tiny_rows, output_dir="/content/runs/a")
    assert any("/content/runs/a disappears with this session" in n for n in plan.notes)
    assert "disappears with this session" in str(plan)


def test_a_drive_that_is_not_mounted_is_a_problem_of_the_cell(tmp_path):
    check_drive(tmp_path / "drive/MyDrive/a", {}, tmp_path / "drive")
    check_drive(tmp_path / "runs/a", COLAB, tmp_path / "drive")
    with pytest.raises(ConfigError) as caught:
        check_drive(tmp_path / "drive/MyDrive/a", COLAB, tmp_path / "drive")
    assert str(caught.value).splitlines()[1] == (
        f"  output_dir  Drive is not mounted, so {tmp_path}/drive/MyDrive/a would disappear with this session; "
        'run: from google.colab import drive; drive.mount("/content/drive")'
    )
    with mounted(tmp_path / "drive"):
        check_drive(tmp_path / "drive/MyDrive/a", COLAB, tmp_path / "drive")


@pytest.mark.parametrize(
    ("folder", "environ", "kept"),
    [
        ("/content/drive/MyDrive/a", COLAB, True),
        ("/content/a", COLAB, False),
        ("/kaggle/working/a", KAGGLE, True),
        ("/kaggle/temp/a", KAGGLE, False),
        ("/home/jovyan", {"BINDER_SERVICE_HOST": "1"}, False),
        ("/home/me", {}, None),
    ],
)
def test_what_stays(folder, environ, kept):
    assert stays(Path(folder), environ) is kept


def test_other_rooms_are_on_other_disks(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "other"))
    monkeypatch.chdir(tmp_path)
    with mounted(tmp_path / "other", "2m"):
        first, *others = rooms(Path("runs/run1"), tmp_path / "cache", {})
        assert (first.path, first.holds_cache) == ("runs/run1", True) and first.free_bytes > 2 << 20
        assert [(r.path, r.free_bytes, r.holds_cache) for r in others] == [(str(tmp_path / "other"), 2 << 20, False)]
        first, *others = rooms(tmp_path / "other/run1", tmp_path / "cache", {})
        assert first.free_bytes == 2 << 20 and [r.path for r in others] == [str(tmp_path)]
