"""Who holds memory, what was freed and what fits, as text and as tables."""

from __future__ import annotations

import pytest

from nbqlora.core.fit import FitReport
from nbqlora.core.holders import Freed, FreedReport, Holder, HoldersReport
from nbqlora.view.holders import fit_html, fit_text, freed_html, freed_text, holders_html, holders_text

GIB, MIB = 1 << 30, 1 << 20
CARD = HoldersReport(
    has_card=True,
    holders=(
        Holder(kind="variable", name="model", card_bytes=5 * GIB, ram_bytes=GIB, note="also Out[3]"),
        Holder(kind="output", name="Out[5]", card_bytes=GIB),
        Holder(kind="error", name="the last error (ValueError)", card_bytes=GIB // 2),
        Holder(kind="pool", name="captured steps", card_bytes=GIB, note="graphs of a model that is loaded"),
        Holder(kind="rest", name="no name here", card_bytes=300 * MIB, note="workspaces"),
    ),
    notes=("a note",),
)
EVIL = "<script>alert(1)</script>"


def test_who_on_a_card() -> None:
    assert holders_text(CARD).splitlines() == [
        "who holds memory",
        "                                   card      RAM",
        "  model                         5.0 GiB  1.0 GiB  del model; also Out[3]",
        "  Out[5]                        1.0 GiB           --free",
        "  the last error (ValueError)  0.50 GiB           --free",
        "  captured steps                1.0 GiB           graphs of a model that is loaded",
        "  no name here                 0.29 GiB           workspaces",
        "a note",
    ]
    page = holders_html(CARD)
    assert page.count("<tr>") == 6 and "del model; also Out[3]" in page and "a note" in page
    assert repr(CARD) == "HoldersReport(5 holders, 7.8 GiB)"


def test_who_without_a_card_or_holders() -> None:
    report = HoldersReport(has_card=False, holders=())
    assert holders_text(report) == "who  nothing of 1 MiB or more is held by this notebook"
    assert holders_html(report) == "<p>who  nothing of 1 MiB or more is held by this notebook</p>"
    ram = HoldersReport(has_card=False, holders=(Holder(kind="variable", name=EVIL, ram_bytes=GIB),))
    assert EVIL not in holders_html(ram) and "card" not in holders_text(ram)


def test_what_was_freed() -> None:
    names = tuple(f"Out[{n}]" for n in range(9))
    freed = (
        Freed(what="the last error", names=("ValueError",), card_bytes=GIB, ram_bytes=0),
        Freed(what="results of cells", names=names, card_bytes=0, ram_bytes=5 * MIB),
    )
    report = FreedReport(has_card=True, freed=freed)
    assert freed_text(report).splitlines() == [
        "freed  1.0 GiB on the card",
        "  the last error    1.0 GiB      -  ValueError",
        "  results of cells        -  5 MiB  Out[0], Out[1], Out[2], Out[3], Out[4], Out[5], 3 more",
    ]
    assert freed_html(report).count("<tr>") == 3
    none = Freed(what="cache and garbage", names=(), card_bytes=0, ram_bytes=500)
    nothing = freed_text(FreedReport(has_card=False, freed=(none,))).splitlines()[0]
    assert nothing == "freed  less than 1 MiB in RAM: variables hold the rest, or libraries (--who)"


def test_what_does_not_fit() -> None:
    report = FitReport(model=EVIL, plan=None, lines=("it fits with max_length = 64", EVIL))
    assert fit_text(report) == f"{EVIL} does not fit\n  it fits with max_length = 64\n  {EVIL}"
    assert EVIL not in fit_html(report) and "<li>it fits with max_length = 64</li>" in fit_html(report)
    assert (report.fits, repr(report)) == (False, f"FitReport({EVIL}: does not fit)")
    assert report.as_dict() == {"model": EVIL, "fits": False, "lines": list(report.lines), "plan": None}


@pytest.mark.parametrize("value", [CARD, FreedReport(has_card=True, freed=())])
def test_they_are_plain_data(value: HoldersReport | FreedReport) -> None:
    import json

    assert json.loads(json.dumps(value.as_dict()))["has_card"] is True
