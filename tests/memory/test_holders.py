"""Who holds memory in a real IPython shell, and letting go of what it keeps by itself, by weak references."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from nbqlora.core.holders import Holder, HoldersReport
from nbqlora.memory import reach
from nbqlora.memory.holders import free, who
from nbqlora.run.session import collect

MIB = 1 << 20
Run = Callable[[str], None]


@pytest.fixture
def shell() -> Iterator[Any]:
    shell = InteractiveShell.instance()
    yield shell
    shell.reset(new_session=False)
    InteractiveShell.clear_instance()


@pytest.fixture
def run(shell: Any) -> Run:
    """Runs a cell; ``mib(n)`` makes n MiB of tensor, and the cell's numbers count up."""
    shell.user_ns.update(torch=torch, numpy=numpy, mib=lambda n: torch.ones(n * MIB // 4))

    def run_cell(code: str) -> None:
        with capture_output():
            shell.run_cell(code, store_history=True)

    return run_cell


def held(report: HoldersReport) -> dict[str, int]:
    """MiB by name."""
    return {h.name: h.ram_bytes // MIB for h in report.holders}


def one(report: HoldersReport, name: str) -> Holder:
    return next(h for h in report.holders if h.name == name)


class Session:
    """A finished run's, as ``nbqlora.run`` keeps it."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.loaded = name, [tensor]

    def free(self) -> None:
        self.loaded.clear()


def test_variables_are_found_in_whatever_they_are(shell: Any, run: Run) -> None:
    run("""
class Plain:
    pass
def outer():
    inside = mib(6)
    return lambda: inside
def given():
    yield from ()
    inside = mib(1)
listed, model = [{"deep": (mib(2),)}], torch.nn.Linear(1024, 1024)
array, view = numpy.zeros(5 * 2**17), torch.zeros(2**20)[:7]
closure, thing, text = outer(), Plain(), "x" * (7 * 2**20)
thing.a, thing.me = mib(8), thing
generator = (t for t in [mib(9)])
trained = torch.nn.Parameter(torch.zeros(2**18))
trained.grad = torch.zeros(2**18)
shell = get_ipython()
frozen, ring = frozenset([1]), []
ring.append(ring)
""")
    expected = {
        "text": 7, "thing": 8, "closure": 6, "generator": 9, "array": 5, "listed": 2, "model": 4, "view": 4,
        "trained": 2,
    }  # fmt: skip
    assert held(who(shell)) == expected


def test_what_is_shared_belongs_to_the_variable_and_says_so(shell: Any, run: Run) -> None:
    run("a = mib(4)\nb = {'the same': a}")
    run("a")
    run("mib(3)")
    run("mib(2)")
    report = who(shell)
    assert held(report) == {"a": 4, "Out[3]": 3, "Out[4]": 2}
    assert one(report, "a").note == "also Out[2], ___"
    assert one(report, "Out[4]").note == "also _"
    assert [h.automatic for h in report.holders] == [False, True, True]


def test_a_kept_graph_is_told_whatever_its_size(shell: Any, run: Run) -> None:
    run("model = torch.nn.Linear(4, 4)\nlosses = [model(torch.ones(1, 4)).sum()]")
    assert one(who(shell), "losses").note == ("keeps an autograd graph, of unknown size: .item() or .detach() lets go")


def test_the_last_error_holds_the_locals_of_its_frames(shell: Any, run: Run) -> None:
    run("def fails():\n    local = mib(5)\n    raise ValueError('no')\nfails()")
    report = who(shell)
    assert held(report) == {"the last error (ValueError)": 5}
    assert report.holders[0].automatic


def test_finished_runs_are_named(shell: Any, run: Run) -> None:
    session = Session("run7", torch.zeros(MIB))
    shell.user_ns["run7"] = [session]  # a Run refers to its session
    report = who(shell, [session])
    assert [(h.name, h.kind, h.ram_bytes // MIB, h.automatic) for h in report.holders] == [("run7", "run", 4, True)]


def test_too_many_objects_are_not_all_looked_at(shell: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "MOST_OBJECTS", 500)
    run("many = [[i] for i in range(2000)]")
    assert who(shell).notes == ("there is more than was looked at: these figures are not all",)


def kept_by_the_notebook(run: Run, shell: Any) -> list[weakref.ref[Any]]:
    """An error's local and three results, each so large (32 MiB) that the C library gives it back at once."""
    references: list[weakref.ref[Any]] = []
    shell.user_ns["note"] = lambda thing: references.append(weakref.ref(thing)) or thing
    run("note(mib(34))")
    run("note(mib(36))")
    run("def fails():\n    local = note(mib(40))\n    raise ValueError('no')\nfails()")
    run("note(mib(38))")
    assert len(references) == 4
    assert all(reference() is not None for reference in references)
    return references


def test_free_lets_go_of_all_that_the_notebook_keeps(shell: Any, run: Run) -> None:
    references = kept_by_the_notebook(run, shell)
    session = Session("run7", torch.ones(2**24))
    found = free(shell, [session], collect)
    assert [reference() for reference in references] == [None] * 4
    assert not session.loaded
    assert [(f.what, f.names) for f in found.freed] == [
        ("cache and garbage", ()),
        ("the last error", ("ValueError",)),
        ("results of cells", ("Out[1]", "Out[2]", "Out[4]", "_", "__", "___")),
        ("finished runs", ("run7",)),
    ]
    back = [f.ram_bytes / MIB for f in found.freed[1:]]
    assert back == pytest.approx([40, 108, 64], abs=4)
    assert not hasattr(sys, "last_value")
    run("1 + 1")
    assert shell.user_ns["_"] == shell.user_ns["Out"][5] == 2, "the notebook goes on as before"


def test_what_has_a_name_of_the_users_stays(shell: Any, run: Run) -> None:
    references = kept_by_the_notebook(run, shell)
    run("""
import sys
mine, error, _2 = Out[1], sys.last_value, mib(1)
__ = 'my own underscore'
""")
    free(shell, [], collect)
    first, second, local, last = (reference() for reference in references)
    assert first is shell.user_ns["mine"] and second is None and last is None
    assert local is not None, "an error that a variable keeps stays whole, with its frames"
    assert shell.user_ns["_2"].nbytes == MIB and shell.user_ns["__"] == "my own underscore"
    assert str(shell.user_ns["error"]) == "no"


def test_the_error_of_the_cell_just_before(shell: Any, run: Run) -> None:
    references: list[weakref.ref[Any]] = []
    shell.user_ns["note"] = lambda thing: references.append(weakref.ref(thing)) or thing
    run("def fails():\n    local = note(mib(5))\n    raise ValueError('no')\nfails()")
    free(shell, [], collect)
    assert [reference() for reference in references] == [None]
    assert shell.last_execution_result.success


def test_what_a_function_can_see_is_not_its_own(shell: Any) -> None:
    module = ModuleType("elsewhere")
    exec("def f(x=None):\n    return big", module.__dict__)
    module.big = torch.ones(MIB)  # type: ignore[attr-defined]
    shell.user_ns["f"] = module.f
    assert who(shell).holders == ()
    module.f.__defaults__ = (torch.ones(MIB),)
    assert held(who(shell)) == {"f": 4}


def test_an_opened_debugger_lets_go(shell: Any, run: Run) -> None:
    references = kept_by_the_notebook(run, shell)
    debugger = shell.InteractiveTB.debugger_cls()
    shell.InteractiveTB.pdb = debugger
    debugger.reset()
    debugger.botframe = sys.last_traceback.tb_frame
    debugger.setup(sys.last_traceback.tb_next.tb_frame, sys.last_traceback)
    free(shell, [], collect)
    assert [reference() for reference in references] == [None] * 4


def test_there_is_nothing_to_free(shell: Any) -> None:
    found = free(shell, [], lambda: None)
    assert [f.names for f in found.freed] == [()] * 4
    assert repr(found).startswith("FreedReport(")
