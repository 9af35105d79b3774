"""Who holds memory in a notebook, by the names that its user knows; and letting go of what no user asked to keep.

The shell is given, so nothing of IPython is imported here. Variables are counted first, so that what they share with an
output or an error is theirs; then the results of cells, the last error, and finished runs. On a card torch also knows
the pools of captured graphs, which no object in Python holds, and what it keeps to hand out again. What is left has no
name here: workspaces of libraries, graphs of autograd, objects of other threads.

It takes tens of milliseconds, for it looks at every object that the notebook can reach.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from nbqlora.core.holders import Freed, FreedReport, Holder, HoldersReport
from nbqlora.core.units import MIB
from nbqlora.memory.automatic import drop_errors, drop_outputs, errors, outputs
from nbqlora.memory.host import resident_bytes
from nbqlora.memory.probe import cuda_started
from nbqlora.memory.reach import Reached, Walk

GRAPH = "keeps an autograd graph, of unknown size: .item() or .detach() lets go"
_SHOWN_BYTES = MIB


class Session(Protocol):
    """A finished run's model, as ``nbqlora.run`` keeps it."""

    name: str

    def free(self) -> None:
        """Let go of it."""


def who(shell: Any, sessions: Sequence[Session] = ()) -> HoldersReport:
    """Everything of 1 MiB or more that the notebook keeps.

    Args:
        shell: an IPython shell.
        sessions: of finished runs.
    """
    own, kept = dict(shell.user_ns), outputs(shell)
    walk = Walk([shell, shell.user_ns, shell.user_ns_hidden, own.get("_oh"), own, *sessions])
    found = list(_variables(own, shell.user_ns_hidden, kept, walk))
    found += _outputs(kept, walk)
    found += _one("error", _error_name(), [walk.enter(x) for x in errors(shell)])
    for session in sessions:
        found += _one("run", session.name, [walk.enter(session, again=True)], "finished")
    cuda, has_card = _cuda()
    found += _on_card(cuda, found) if has_card else []
    notes = () if walk.whole else ("there is more than was looked at: these figures are not all",)
    return HoldersReport(has_card=has_card, holders=tuple(_sorted(found, has_card)), notes=notes)


def free(shell: Any, sessions: Sequence[Session], collect: Callable[[], None]) -> FreedReport:
    """Let go of the last error, the results of cells, finished runs, and the allocator's cache; never of a variable.

    Args:
        shell: an IPython shell.
        sessions: of finished runs.
        collect: gives memory back to the card and the system.
    """
    cuda, has_card = _cuda()
    steps: list[tuple[str, Callable[[], tuple[str, ...]]]] = [
        ("cache and garbage", tuple),
        ("the last error", lambda: drop_errors(shell)),
        ("results of cells", lambda: drop_outputs(shell)),
        ("finished runs", lambda: _free_sessions(sessions)),
    ]
    freed = []
    for what, drop in steps:
        before = _bytes(cuda)
        names = drop()
        collect()  # each time, so that what a holder gave back is its own
        card, ram = (max(0, b - a) for b, a in zip(before, _bytes(cuda), strict=True))
        freed.append(Freed(what=what, names=names, card_bytes=card, ram_bytes=ram))
    return FreedReport(has_card=has_card, freed=tuple(freed))


def _variables(
    own: Mapping[str, Any], hidden: Mapping[str, Any], kept: Mapping[str, Any], walk: Walk
) -> Iterator[Holder]:
    for name, value in own.items():
        if name in hidden and hidden[name] is value:
            continue
        also = [other for other, result in kept.items() if result is value]
        yield from _one("variable", name, [walk.enter(value)], f"also {', '.join(also)}" if also else "")


def _outputs(kept: Mapping[str, Any], walk: Walk) -> Iterator[Holder]:
    for name, value in kept.items():
        also = [other for other, result in kept.items() if result is value and other != name]
        yield from _one("output", name, [walk.enter(value)], f"also {', '.join(also)}" if also else "")


def _error_name() -> str:
    last = getattr(sys, "last_value", None)
    return f"the last error ({type(last).__name__})" if last is not None else "the last error"


def _one(kind: Any, name: str, reached: Sequence[Reached], note: str = "") -> Iterator[Holder]:
    card, ram = sum(r.card_bytes for r in reached), sum(r.ram_bytes for r in reached)
    graph = GRAPH if any(r.graph for r in reached) else ""
    if card + ram >= _SHOWN_BYTES or (graph and kind == "variable"):
        note = "; ".join(filter(None, [note, graph]))
        yield Holder(kind=kind, name=name, card_bytes=card, ram_bytes=ram, note=note)


def _on_card(cuda: Any, found: Sequence[Holder]) -> Iterator[Holder]:
    """What torch knows beyond the objects: pools of graphs, cache, and the rest that it handed out."""
    segments = [s for s in cuda.memory_snapshot() if s["device"] == cuda.current_device()]
    of_graphs = [s for s in segments if tuple(s["segment_pool_id"]) != (0, 0)]
    pools, in_use = (sum(s[size] for s in of_graphs) for size in ("total_size", "allocated_size"))
    allocated, reserved = cuda.memory_allocated(), cuda.memory_reserved()
    named = sum(h.card_bytes for h in found)
    yield from _sized("pool", "captured steps", pools, "graphs of a model that is loaded")
    yield from _sized("cache", "cache", max(0, reserved - allocated - (pools - in_use)), "torch hands it out again")
    yield from _sized("rest", "no name here", max(0, allocated - in_use - named), "workspaces, autograd, other threads")


def _sized(kind: Any, name: str, n_bytes: int, note: str) -> Iterator[Holder]:
    if n_bytes >= _SHOWN_BYTES:
        yield Holder(kind=kind, name=name, card_bytes=n_bytes, note=note)


def _sorted(found: Sequence[Holder], has_card: bool) -> list[Holder]:
    kinds = list(dict.fromkeys(h.kind for h in found))
    return sorted(found, key=lambda h: (kinds.index(h.kind), -h.card_bytes if has_card else 0, -h.ram_bytes))


def _cuda() -> tuple[Any, bool]:
    """``torch.cuda`` where it has been started, and whether it has; nothing is started here."""
    started = cuda_started()
    return (sys.modules["torch"].cuda if started else None), started


def _bytes(cuda: Any) -> tuple[int, int]:
    """Taken of the card by torch, and of RAM by this process."""
    return (0 if cuda is None else int(cuda.memory_reserved())), resident_bytes()


def _free_sessions(sessions: Sequence[Session]) -> tuple[str, ...]:
    names = tuple(session.name for session in sessions)
    for session in sessions:
        session.free()
    return names
