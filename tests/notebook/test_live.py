"""The live view in a real kernel: one block that updates, an interrupt that saves, a static twin."""

from __future__ import annotations

import re
import time

import pytest
from jupyter_client.manager import start_new_kernel

from nbqlora.core.display import is_static
from nbqlora.core.events import EvalEvent, NoteEvent, PhaseEvent, StepEvent
from nbqlora.notebook.live import updates_per_second
from nbqlora.view.progress import Progress


@pytest.fixture(scope="module")
def kernel(tiny_folder, tmp_path_factory):
    import os

    env = {**os.environ, "NBQLORA_DISPLAY": "live"}
    manager, client = start_new_kernel(env=env, cwd=str(tmp_path_factory.mktemp("kernel")))
    repo = os.getcwd()
    execute(client, f"import sys; sys.path.insert(0, {repo!r})\n%load_ext nbqlora\nfrom tests.tiny import make_rows")
    execute(client, f"rows = make_rows(12)\nfolder = {str(tiny_folder)!r}")
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def execute(client, code, *, on_message=None, timeout=180):
    """Run a cell; returns its IOPub messages as (kind, content)."""
    wanted = client.execute(code)
    seen = []
    while True:
        message = client.get_iopub_msg(timeout=timeout)
        if message["parent_header"].get("msg_id") != wanted:
            continue
        kind, content = message["msg_type"], message["content"]
        if kind == "status" and content["execution_state"] == "idle":
            return seen
        seen.append((kind, content))
        if on_message is not None:
            on_message(kind, content)


CELL = '%%finetune run1\nmodel = "{folder}"\ndata = "$rows"\nmax_steps = {steps}\nmax_length = 96\n'


def test_one_block_updates_and_ends_as_the_report(kernel, tiny_folder):
    _, client = kernel
    seen = execute(client, CELL.format(folder=tiny_folder, steps=3))
    assert not [c for k, c in seen if k in ("error", "stream")], seen
    blocks = {c["transient"]["display_id"] for k, c in seen if k == "update_display_data"}
    updates = [c for k, c in seen if k == "update_display_data"]
    assert len(blocks) <= 2
    assert any('role="progressbar"' in c["data"].get("text/html", "") for c in updates)
    assert updates[-1]["data"]["text/plain"].startswith("run1: done in")
    assert max(len(c["data"].get("text/html", "")) for c in updates) < 15_000
    assert [k for k, c in seen if "image/png" in c.get("data", {})] == ["display_data"]


def test_the_interrupt_finishes_the_step_saves_and_ends_normally(kernel, tiny_folder):
    manager, client = kernel
    sent = []

    def interrupt(kind, content):
        html = content.get("data", {}).get("text/html", "") if kind.endswith("display_data") else ""
        if not sent and re.search(r"step \d+/5000", html):
            sent.append(time.time())
            manager.interrupt_kernel()

    seen = execute(client, CELL.format(folder=tiny_folder, steps=5000), on_message=interrupt)
    assert sent, "the run was over before it could be interrupted"
    assert not [c for k, c in seen if k == "error"]
    last = [c for k, c in seen if k == "update_display_data"][-1]["data"]["text/plain"]
    assert last.startswith("run1: stopped (interrupted) in")
    said = execute(client, "print(run1.status, (run1.adapter_dir / 'adapter_model.safetensors').exists())")
    assert said[-1][1]["text"] == "stopped True\n"
    assert execute(client, "print(len(run1.report.steps) < 5000)")[-1][1]["text"] == "True\n"


def test_static_mode_is_asked_for_or_found():
    assert is_static({"NBQLORA_DISPLAY": "static"})
    assert is_static({}, asked=True)
    assert is_static({"KAGGLE_KERNEL_RUN_TYPE": "Batch"})
    assert not is_static({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"})
    assert not is_static({"KAGGLE_KERNEL_RUN_TYPE": "Batch", "NBQLORA_DISPLAY": "live"})
    assert (updates_per_second({}), updates_per_second({"COLAB_RELEASE_TAG": "x"})) == (2.0, 1.0)


def test_progress_says_where_it_is_and_when_it_ends():
    progress = Progress("run1")
    progress.take(PhaseEvent(phase="train", detail="10 steps", elapsed_seconds=0.0))
    for step in (1, 2, 3):
        progress.take(
            StepEvent(
                step=step, total_steps=10, loss=4.0 / step, learning_rate=1e-3, grad_norm=1.0, n_tokens=600,
                seconds=30.0 if step == 1 else 3.0, peak_bytes=2**30, elapsed_seconds=1.0,
            )
        )  # fmt: skip
    progress.take(EvalEvent(step=3, loss=1.5, elapsed_seconds=2.0))
    progress.take(NoteEvent(text="<b>careful</b>", elapsed_seconds=2.0))
    assert progress.share == pytest.approx(0.3)
    assert progress.eta_seconds == pytest.approx(21.0)
    assert progress.text() == (
        "run1: training 10 steps · step 3/10 · loss 1.333 · eval 1.500 · 200 tokens/s · peak 1.0 GiB · "
        "under 1 min left · <b>careful</b>"
    )
    html = progress.html()
    assert 'aria-valuenow="30"' in html
    assert "&lt;b&gt;careful" in html
    assert "loss from 4.000 to 1.333 over 3 steps" in html
    assert len(html) < 3_000
