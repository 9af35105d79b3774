"""Checks and their report as values."""

from __future__ import annotations

import json
import pickle

import pytest

from nbqlora.core.doctor import Check, CheckStatus, DoctorReport


def report(*statuses: CheckStatus) -> DoctorReport:
    return DoctorReport(checks=tuple(Check(name=f"c{i}", status=s, found="f") for i, s in enumerate(statuses)))


def test_a_message_is_split_into_what_was_found_and_what_to_do() -> None:
    check = Check.of("hub", "warning", "no answer; try again; or later")
    assert (check.found, check.advice) == ("no answer", "try again; or later")
    assert str(check) == "no answer; try again; or later"
    assert str(Check.of("hub", "ok", "it answers")) == "it answers"


@pytest.mark.parametrize(
    ("statuses", "verdict", "ok"),
    [
        (("ok", "skipped"), "all well", True),
        (("ok", "warning"), "1 warning", True),
        (("problem", "warning", "problem"), "2 problems, 1 warning", False),
    ],
)
def test_the_verdict_counts_problems_and_warnings(statuses: tuple[CheckStatus, ...], verdict: str, ok: bool) -> None:
    found = report(*statuses)
    assert (found.verdict, found.ok) == (verdict, ok)
    said = [c.status for c in (*found.problems, *found.warnings)]
    assert said == sorted(s for s in statuses if s in ("problem", "warning"))
    assert repr(found) == f"DoctorReport({verdict}; {len(statuses)} checks)"


def test_a_report_is_json_and_can_be_pickled() -> None:
    found = report("ok", "problem")
    assert json.loads(json.dumps(found.as_dict())) == {
        "ok": False,
        "checks": [
            {"name": "c0", "status": "ok", "found": "f", "advice": ""},
            {"name": "c1", "status": "problem", "found": "f", "advice": ""},
        ],
    }
    assert pickle.loads(pickle.dumps(found)) == found
