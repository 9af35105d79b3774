"""``%vram`` in real kernels, the installed one and Colab's: what is let go of, and a meter under later cells."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.notebook.kernels import Kernel, Said

# numpy's arrays can be referred to weakly and their memory is the process's, as a tensor's; torch takes 2 s to import.
START = """
%load_ext nbqlora
import gc, weakref, numpy
kept = []
def note(n_mib):
    found = numpy.ones(n_mib * 2**17)
    kept.append(weakref.ref(found))
    return found
def alive():
    gc.collect()
    return [reference() is not None for reference in kept]
def fails():
    local = note(16)
    raise ValueError("no")
"""


def listen(kernel: Kernel, code: str) -> list[dict[str, Any]]:
    """All that the kernel says until this cell is done, whichever cell it is said for."""
    client = kernel._client
    request, heard = client.execute(code), []
    while True:
        message = client.get_iopub_msg(timeout=60)
        heard.append(message)
        done = message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
        if done and message["parent_header"].get("msg_id") == request:
            return heard


def kinds(messages: list[dict[str, Any]]) -> list[str]:
    return [m["msg_type"] for m in messages if m["msg_type"] not in ("status", "execute_input")]


def test_vram_in_a_real_kernel(kernel_packages: Path | None, tmp_path: Path) -> None:
    with Kernel(tmp_path, kernel_packages) as kernel:
        assert kernel.run(START).error == ""
        _shown_once(kernel)
        _free(kernel)
        _watch(kernel)
        _cells(kernel)


def _shown_once(kernel: Kernel) -> None:
    for code in ("%vram", "r = %vram", "%vram\n1;"):
        assert kinds(listen(kernel, code)) == ["display_data"], code
    assert kinds(listen(kernel, "r")) == ["execute_result"]
    assert kinds(listen(kernel, "%vram --json")) == ["stream"]
    said = kernel.run("%vram --whoo")
    assert said.shown == [
        "ConfigError: 1 problem in the %vram line",
        "  %vram  unrecognized arguments: --whoo; did you mean --who?",
    ]


def _free(kernel: Kernel) -> None:
    """An error's locals and three results go; what a variable holds stays."""
    for code in ("note(8)", "note(9)", "mine = note(4)", "mine", "fails()"):
        kernel.run(code)
    assert kernel.run("print(alive())").text.strip() == str([True] * 4)
    said = kernel.run("%vram --who")
    assert re.search(r"mine\s+4 MiB\s+del mine; also Out\[\d+\], _\n", said.text), said
    assert re.search(r"the last error \(ValueError\)\s+0.02 GiB\s+--free\n", said.text), said
    said = kernel.run("%vram --free")
    assert re.search(r"the last error\s+0.02 GiB\s+ValueError\n", said.text), said
    assert re.search(r"results of cells\s+0.02 GiB\s+Out", said.text), said
    assert kernel.run("print(alive())").text.strip() == str([False, False, True, False])
    assert kernel.run("2 + 2").text.strip() == "4" and kernel.run("print(_, mine.nbytes)").text.strip() == "4 4194304"


def _watch(kernel: Kernel) -> None:
    """Updates arrive while later cells run, for the display of the first; a second meter ends the first."""
    (shown,) = [m for m in listen(kernel, "%vram --watch") if m["msg_type"] == "display_data"]
    name = shown["content"]["transient"]["display_id"]
    code = "import time\nfor n in (100, 300):\n    held = numpy.ones(n * 2**17)\n    time.sleep(1.6)"
    updates = [m["content"] for m in listen(kernel, code) if m["msg_type"] == "update_display_data"]
    assert len(updates) >= 2 and {u["transient"]["display_id"] for u in updates} == {name}
    sizes = [len(u["data"]["text/plain"]) + len(u["data"]["text/html"]) for u in updates]
    assert max(sizes) <= 2000
    assert "updates while cells run" in updates[-1]["data"]["text/plain"]
    last = [m["content"] for m in listen(kernel, "%vram --watch") if m["msg_type"] == "update_display_data"]
    assert "stopped: another meter was started" in last[-1]["data"]["text/plain"]
    assert last[-1]["transient"]["display_id"] == name


def _cells(kernel: Kernel) -> None:
    said: Said = kernel.run("%vram --cells on")
    assert said.text.strip() == ""
    assert re.search(r"^ram   \+0\.1\d GiB, now", kernel.run("more = numpy.ones(128 * 2**17)").text, re.MULTILINE)
    kernel.run("%vram --cells off")
    assert kernel.run("x = 1").text.strip() == ""
