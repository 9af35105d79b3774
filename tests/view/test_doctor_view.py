"""A doctor's report as text and as a table."""

from __future__ import annotations

from html.parser import HTMLParser

from nbqlora.core.doctor import Check, DoctorReport
from nbqlora.view import register_all
from nbqlora.view.doctor import doctor_html, doctor_text

LONG = (
    "torch 2.13.0, transformers 5.23.0, trl 1.16.0, peft 0.21.2, bitsandbytes 0.50.2, accelerate 1.15.0, datasets 5.2.0"
)
REPORT = DoctorReport(
    checks=(
        Check(name="card", status="ok", found="Tesla T4, capability 7.5, 14.6 GiB of 14.7 GiB free"),
        Check(name="libraries", status="ok", found=LONG),
        Check(
            name="hub", status="warning", found="https://huggingface.co cannot be reached", advice="check the network"
        ),
        Check(name="model", status="problem", found="org/m is gated", advice="accept its licence " * 8),
        Check(name="triton", status="skipped", found="not used on a CPU"),
    )
)


class Table(HTMLParser):
    """The rows of a page's table as lists of texts; what is bold; every tag used."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.bold: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "strong" in self.open:
            self.bold.append(data)


def test_the_report_as_lines() -> None:
    assert (
        doctor_text(REPORT)
        == """\
nbqlora doctor: 1 problem, 1 warning
  card       ok       Tesla T4, capability 7.5, 14.6 GiB of 14.7 GiB free
  libraries  ok       torch 2.13.0, transformers 5.23.0, trl 1.16.0, peft 0.21.2, bitsandbytes 0.50.2, accelerate
                      1.15.0, datasets 5.2.0
  hub        warning  https://huggingface.co cannot be reached
                      -> check the network
  model      problem  org/m is gated
                      -> accept its licence accept its licence accept its licence accept its licence accept its
                         licence accept its licence accept its licence accept its licence
  triton     skipped  not used on a CPU"""
    )


def test_no_line_is_broken_inside_an_address_or_too_long() -> None:
    address = "https://huggingface.co/" + "a-long-name-" * 12
    checks = (Check(name="model", status="problem", found=f"see {address}", advice="word " * 60),)
    lines = doctor_text(DoctorReport(checks=checks)).splitlines()
    assert any(line.endswith(address) for line in lines)
    assert all(len(line) <= 118 for line in lines if address not in line)


def test_the_same_as_a_table_in_words() -> None:
    table = Table(doctor_html(REPORT))
    assert table.rows[0] == ["check", "result", "found, and what to do"]
    assert table.rows[3] == [
        "hub",
        "warning",
        "https://huggingface.co cannot be reached→ check the network",
    ]
    assert [row[1] for row in table.rows[1:]] == ["ok", "ok", "warning", "problem", "skipped"]
    assert table.bold == ["nbqlora doctor: 1 problem, 1 warning", "warning", "problem"]


def test_every_text_is_escaped_and_no_colour_is_needed() -> None:
    evil = "<script>alert(1)</script>"
    page = doctor_html(DoctorReport(checks=(Check(name=evil, status="problem", found=evil, advice=evil),)))
    table = Table(page)
    assert set(table.tags) == {"div", "p", "strong", "table", "tr", "th", "td", "br"}
    assert table.rows[1] == [evil, "problem", f"{evil}→ {evil}"]
    assert "color:" not in page and "background" not in page


def test_a_report_shows_itself() -> None:
    register_all()
    assert str(REPORT) == doctor_text(REPORT)
    assert REPORT._repr_html_() == doctor_html(REPORT)
