"""A folder that disappears with its session is said before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbqlora.run.places import default_output_dir, ephemeral_note

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
