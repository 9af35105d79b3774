"""The live view in real kernels: a line and charts that update, what they weigh and cost, an interrupt that saves."""

from __future__ import annotations

import os
import re
from itertools import pairwise

import pytest
from jupyter_client.manager import start_new_kernel

from nbqlora.core.display import is_static
from nbqlora.notebook.live import COLAB, Pace, pace_of
from tests.notebook.kernels import QUICK
from tests.notebook.wire import Sent, execute, shown

CELL = '%%finetune run1\nmodel = "{folder}"\ndata = "$rows"\nmax_length = 96\n'
# The report and the picture.
LAST_BYTES = 26_000
# Seconds of the view's own work, those of the thread that draws included.
METER = """
import time
from nbqlora.notebook import live
spent = []
def metered(method):
    def call(*given):
        begun = time.thread_time()
        try:
            return method(*given)
        finally:
            spent.append(time.thread_time() - begun)
    return call
for name in ("__call__", "_memory", "_draw"):
    setattr(live.LiveView, name, metered(getattr(live.LiveView, name)))
"""


def start(where, **environment):
    env = {**os.environ, **QUICK, "NBQLORA_DISPLAY": "live", "PYDEVD_DISABLE_FILE_VALIDATION": "1", **environment}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), os.getcwd()]))
    manager, client = start_new_kernel(env=env, cwd=str(where))
    execute(client, "%load_ext nbqlora\nfrom tests.tiny import make_rows\nrows = make_rows(12)")
    return manager, client


def stop(manager, client):
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    manager, client = start(tmp_path_factory.mktemp("kernel"))
    yield manager, client
    stop(manager, client)


def test_the_line_becomes_data_plan_and_report_and_the_charts_a_picture(kernel, tiny_folder):
    _, client = kernel
    seen = execute(client, CELL.format(folder=tiny_folder) + "max_steps = 3\n")
    assert not [m for m in seen if m.kind in ("error", "stream")], seen
    last = {}
    for message in shown(seen):
        last[message.place] = message.data
    kinds = [text.split()[0] for text in (data["text/plain"] for data in last.values())]
    assert kinds == ["data", "plan", "run1:", "loss"], "each output ends as a whole, and none is left over"
    assert last and sorted([*last.values()][-1]) == ["image/png", "text/plain"]
    report = [*last.values()][2]
    assert report["text/plain"].startswith("run1: done in")
    assert "<table" in report["text/html"] and '<th scope="row"' in report["text/html"]


def test_an_interrupt_finishes_the_step_saves_and_the_view_cost_less_than_a_hundredth(kernel, tiny_folder):
    manager, client = kernel
    execute(client, METER)
    lines: list[Sent] = []

    def interrupt(message: Sent) -> None:
        if re.search(r"step \d+/500000", message.data.get("text/html", "")):
            lines.append(message)
            if len(lines) == 6:
                manager.interrupt_kernel()

    seen = execute(client, CELL.format(folder=tiny_folder) + "max_steps = 500000\n", on_message=interrupt)
    assert not [m for m in seen if m.kind == "error"]
    assert any("■ stops after this step and saves" in m.data.get("text/html", "") for m in seen)
    assert any(m.data.get("text/plain", "").startswith("run1: stopping after this step") for m in seen)
    assert any(m.data.get("text/plain", "").startswith("run1: stopped (interrupted) in") for m in seen)
    check = """
steps = run1.report.steps
print(run1.status, (run1.adapter_dir / "adapter_model.safetensors").exists(), len(steps) < 500000,
      len(steps), sum(spent) / sum(e.seconds for e in steps))
"""
    said = execute(client, check)[-1].content["text"].split()
    assert said[:3] == ["stopped", "True", "True"]
    assert int(said[3]) > 50, "too few steps to measure by"
    assert float(said[4]) < 0.01, f"the view took {float(said[4]):.2%} of the steps' time"


def test_a_failed_cell_leaves_the_last_state_above_its_error(kernel, tiny_folder):
    _, client = kernel
    seen = execute(client, CELL.format(folder=tiny_folder) + "max_steps = 300000\n[trl]\nadam_beta1 = -1\n")
    assert [m.content["ename"] for m in seen if m.kind == "error"]
    assert shown(seen)[-1].data["text/plain"].startswith("run1: failed")


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """Colab's kernel, in Colab's mode."""
    from tests.notebook.kernels import NotInstallableError, old_kernel_folder

    try:
        packages = str(old_kernel_folder())
    except NotInstallableError as error:
        pytest.skip(f"Colab's kernel could not be installed: {error}")
    where = tmp_path_factory.mktemp("colab")
    manager, client = start(where, COLAB_RELEASE_TAG="release", PYTHONPATH=packages)
    yield client
    stop(manager, client)


def trained(client, folder, minutes: float) -> list[Sent]:
    """What a run of so many minutes sends."""
    cell = CELL.format(folder=folder) + f"max_steps = 500000\nmax_minutes = {minutes}\nsave_minutes = 0.05\n"
    seen = execute(client, cell)
    assert any(m.data.get("text/plain", "").startswith("run1: stopped") for m in seen), seen[-3:]
    return shown(seen)


def check_sizes(messages: list[Sent]) -> None:
    lines = [m for m in messages if m.data.get("text/html", "").startswith("<progress")]
    charts = [m for m in messages if "<figure" in m.data.get("text/html", "")]
    assert len(lines) > 2
    assert max(m.content_bytes for m in lines) <= 400
    assert max((m.content_bytes for m in charts), default=0) <= 12_000
    gaps = [after.at - before.at for before, after in pairwise(lines)]
    assert sorted(gaps)[len(gaps) // 2] > 0.95, "a line a second"


def test_what_a_run_sends_to_colab_stays_within_its_pace(colab, tiny_folder):
    messages = trained(colab, tiny_folder, 9 / 60)
    check_sizes(messages)
    last = [m for m in messages if m.data["text/plain"].startswith(("run1: stopped (", "loss and memory"))]
    assert len(last) == 2 and sum(m.content_bytes for m in last) < LAST_BYTES
    pages = [m for m in messages if m.data["text/plain"].startswith(("data  ", "plan  "))]
    seconds = messages[-1].at - messages[0].at
    # Data and plan are sent whole; what they take beyond what was saved up, charts have to earn first.
    earned = COLAB.saved_bytes + COLAB.bytes_per_second * (seconds + 1)
    allowed = max(earned, sum(m.content_bytes for m in pages)) + 400 * (seconds + 1)
    assert sum(m.content_bytes for m in messages if m not in last) < allowed


@pytest.mark.slow
def test_no_minute_of_a_run_sends_colab_more_than_60_kb(colab, tiny_folder):
    messages = trained(colab, tiny_folder, 2.2)
    check_sizes(messages)
    assert sum("<figure" in m.data.get("text/html", "") for m in messages) >= 3, "charts, about every 40 s"
    assert messages[-1].at - messages[0].at > 120
    minutes = [[m for m in messages if begin.at <= m.at < begin.at + 60] for begin in messages]
    most = max(sum(m.content_bytes for m in minute) for minute in minutes)
    wire = max(sum(m.wire_bytes for m in minute) for minute in minutes)
    print(f"most in a minute: {most} B of content, {wire} B with the protocol's frames")
    assert most <= 60_000


def test_static_mode_is_asked_for_or_found():
    assert is_static({"NBQLORA_DISPLAY": "static"})
    assert is_static({}, asked=True)
    assert is_static({"KAGGLE_KERNEL_RUN_TYPE": "Batch"})
    assert not is_static({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"})
    assert not is_static({"KAGGLE_KERNEL_RUN_TYPE": "Batch", "NBQLORA_DISPLAY": "live"})
    assert (pace_of({}), pace_of({"COLAB_RELEASE_TAG": "x"})) == (Pace(), COLAB)
