"""``%vram`` and the profile on a card: phases to the byte, their cost, and what is named and given back."""

from __future__ import annotations

import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA card", allow_module_level=True)

import nbqlora  # noqa: E402
from nbqlora.core.specs import MemoryCategory as M  # noqa: E402
from nbqlora.memory.holders import free, who  # noqa: E402
from nbqlora.memory.peak import PeakMeter, highest_before_resets  # noqa: E402
from nbqlora.memory.probe import vram  # noqa: E402
from nbqlora.memory.profile import Profile  # noqa: E402
from nbqlora.run.session import collect, finished  # noqa: E402
from tests import tiny  # noqa: E402

MIB = 1 << 20


def block(n_mib: int) -> Any:
    return torch.ones(n_mib * MIB, dtype=torch.uint8, device="cuda")


@pytest.fixture
def shell() -> Iterator[Any]:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    nbqlora.load_ipython_extension(shell)
    shell.user_ns["block"] = block
    yield shell
    shell.reset(new_session=False)
    InteractiveShell.clear_instance()


def test_phases_to_the_byte() -> None:
    block(1)
    start, around, profile = torch.cuda.memory_allocated(), PeakMeter("cuda"), Profile("cuda")
    around.start()
    with profile:
        kept = block(64)
        profile.enter("forward")
        block(256)
        profile.enter("backward")
        del kept
        block(32)
    found = {
        p.phase: ((p.peak_bytes - start) // MIB, (p.after_bytes - start) // MIB) for p in profile.snapshot().phases
    }
    assert found == {"load": (64, 64), "forward": (320, 64), "backward": (64, 0)}
    assert around.read() == start + 320 * MIB
    assert highest_before_resets() >= start + 320 * MIB
    assert vram().peak_bytes >= start + 320 * MIB


def test_a_boundary_is_cheap() -> None:
    """The shortest step of a 1B model takes 20 ms; three boundaries of it may take 1 %."""
    with Profile("cuda") as profile:
        both = lambda: (profile.enter("forward"), profile.enter("backward"))  # noqa: E731
        seconds = min(timeit.repeat(both, number=500, repeat=5)) / 1000
    print(f"boundary {1e6 * seconds:.1f} us")
    assert 3 * seconds < 0.01 * 0.020


def test_a_run_by_phase_and_holder(medium_folder: Path, tmp_path: Path) -> None:
    rows = tiny.make_rows(64)
    run = nbqlora.finetune(model=str(medium_folder), data=rows, output_dir=str(tmp_path), max_length=512, max_steps=4)
    memory, plan = run.report.memory, run.plan.budget.by_category
    assert memory is not None and memory.highest is not None
    assert memory.kind == "cuda" and run.report.measured_peak_bytes == memory.highest.peak_bytes
    assert sum(memory.by_category.values()) == memory.highest.peak_bytes
    for category in (M.WEIGHTS, M.ADAPTER, M.GRADIENTS, M.OPTIMIZER):
        assert memory.by_category[category] == pytest.approx(plan[category], rel=0.03), category
    report = vram()
    assert report.by_category[M.WEIGHTS] > 0 and M.WEIGHTS in report.reclaimable
    print(run)
    run.free()
    assert M.WEIGHTS not in vram().by_category


def test_who_and_free_on_the_card(shell: Any, medium_folder: Path, tmp_path: Path) -> None:
    rows = tiny.make_rows(16)
    run = nbqlora.finetune(
        name="mine", model=str(medium_folder), data=rows, output_dir=str(tmp_path), max_length=256, max_steps=1
    )
    shell.run_cell("mine = block(100)")
    shell.run_cell("block(50)", store_history=True)
    shell.run_cell("def fails():\n    local = block(70)\n    raise ValueError('no')\nfails()")
    del_me = block(200)
    del del_me  # in torch's cache now
    report = who(shell, finished())
    held = {(h.kind, h.name): h.card_bytes // MIB for h in report.holders}
    assert held["variable", "mine"] == 100 and held["output", "Out[1]"] == 50
    assert held["error", "the last error (ValueError)"] == 70
    assert held["run", "mine"] > 50 and held["cache", "cache"] >= 200
    before = torch.cuda.memory_reserved()
    found = {f.what: f.card_bytes // MIB for f in free(shell, finished(), collect).freed}
    assert found["cache and garbage"] >= 200 and found["the last error"] == 70 and found["results of cells"] == 50
    assert found["finished runs"] > 50
    assert before - torch.cuda.memory_reserved() >= sum(found.values()) * MIB
    assert shell.user_ns["mine"].nbytes == 100 * MIB and run.status == "done"


def test_graphs_of_a_loaded_model_are_named(shell: Any, medium_folder: Path) -> None:
    loaded = nbqlora.load(str(medium_folder), max_length=256, per_device_train_batch_size=2)
    optimizer = loaded.optimizer(learning_rate=1e-4)
    ids = torch.randint(0, 256, (2, 256), device="cuda")
    for _ in range(3):
        loaded.train_step(optimizer, input_ids=ids, labels=ids)
    shell.user_ns["loaded"] = loaded
    held = {h.kind: h.card_bytes // MIB for h in who(shell).holders}
    assert held["variable"] > 50 and held["pool"] > 10
    loaded.release()
    collect()
    assert "pool" not in {h.kind for h in who(shell).holders}


def test_a_line_after_a_cell(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    block(1)
    shell.run_cell("%vram --cells on")
    capsys.readouterr()
    shell.run_cell("kept = block(1024); gone = block(2048); del gone")
    shell.run_cell("%vram --cells off")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("vram  +"))
    assert line.startswith("vram  +1.0 GiB, now ") and "peak 3." in line


def test_fit_after_cuda_counts_what_a_finished_run_gives_back(medium_folder: Path, tmp_path: Path) -> None:
    from nbqlora.core.request import CellRequest
    from nbqlora.run.fit import fit

    request = CellRequest(options={"model": str(medium_folder), "max_length": 256})
    nbqlora.finetune(model=str(medium_folder), data=tiny.make_rows(16), output_dir=str(tmp_path), max_steps=1)
    held = sum(vram().by_category[c] for c in (M.WEIGHTS, M.ADAPTER))
    with_run = fit(request).plan
    for session in finished():
        session.free()
    without = fit(request).plan
    assert with_run is not None and without is not None
    assert abs(with_run.usable_bytes - without.usable_bytes) < 64 * MIB < held
