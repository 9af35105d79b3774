"""The data report as a person sees it: lines that read without colour, HTML that is escaped and small."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from nbqlora import view
from nbqlora.core.data_report import DataReport, Preview, Skipped
from nbqlora.core.specs import BatchLayout, DataStats
from nbqlora.view.data import data_html, data_text, shortened

STATS = DataStats(
    n_rows=9_812,
    n_sequences=1_523,
    n_tokens=1_500_400,
    n_supervised_tokens=900_300,
    max_tokens=1_024,
    percentiles=(20, 90, 150, 210, 400),
    n_truncated=186,
    source="rows.jsonl",
    format="messages",
    layout=BatchLayout.PACKED,
    layout_because="the probe agreed to 2e-6",
)
FIRST = (("<user>\nHello & goodbye\n", False), ("Hi <b>!</b><end>", True))
LONG = (("a", False), ("b" * 5000, True))
REPORT = DataReport(
    stats=STATS,
    n_read=10_000,
    max_length=1_024,
    unit="line",
    histogram=((1, 199, 7_000), (200, 399, 2_500), (400, 599, 306), (600, 30_000, 194)),
    n_cut_tokens=40_100,
    n_cut_learned=30_200,
    n_duplicates=2,
    duplicate_rows=(14, 19),
    skipped=(
        Skipped(reason="no assistant turn", count=187, rows=(3, 9, 17, 30, 31)),
        Skipped(reason="text is empty", count=1, rows=(1_200,)),
    ),
    previews=(
        Preview(row=1, pieces=FIRST, why="the first", n_tokens=12),
        Preview(row=7_001, pieces=LONG, why="the longest", n_tokens=2_000, n_cut_tokens=976),
    ),
    fill=0.962,
)  # fmt: skip


def test_the_text() -> None:
    assert data_text(REPORT).splitlines()[:18] == [
        "data  rows.jsonl: 9,812 of 10,000 lines, 1.5M tokens, 900k of them learned (60 %)",
        "  format       messages",
        "  length       150 tokens in the middle: 5 % have at most 20, 95 % at most 400, the longest has 1,024",
        "                   1 - 199  ##############################     7,000",
        "                 200 - 399  ###########                        2,500",
        "                 400 - 599  #                                    306",
        "              600 - 30,000  #                                    194  cut at 1,024",
        "  cut          186 lines (1.9 %): 40.1k tokens beyond max_length = 1,024 are left away, 30.2k of them to be learned",  # noqa: E501
        "  left out     188 lines (1.9 %)",
        "               187 lines: no assistant turn (lines 3, 9, 17, 30, 31, …)",
        "               1 line: text is empty (line 1,200)",
        "  duplicates   2 lines: the same tokens as an earlier one, and kept (lines 14 and 19)",
        "  layout       packed: 1,523 packs of 1,024 tokens, filled to 96 %; the probe agreed to 2e-6",
        "  line 1       the first, 12 tokens; what is learned stands in «»",
        "      <user>",
        "      Hello & goodbye",
        "      «Hi <b>!</b><end>»",
        "  line 7,001   the longest, 2,000 tokens, 976 of them cut; what is learned stands in «»",
    ]  # fmt: skip
    shown = "".join(line.strip() for line in data_text(REPORT).splitlines()[18:])
    assert re.fullmatch(r"a«b{290,300} ?\[…\] ?b{290,300}»", shown)
    assert all(len(line) <= 118 for line in data_text(REPORT).splitlines())


def test_nothing_to_say_is_said_shortly() -> None:
    clean = replace(
        REPORT, stats=replace(STATS, n_rows=40, n_truncated=0, layout=BatchLayout.JOINED, layout_because="")
    )
    clean = replace(
        clean, n_read=40, unit="row", n_duplicates=0, duplicate_rows=(), skipped=(), previews=(), n_cut_tokens=0
    )
    assert data_text(clean).splitlines()[-4:] == [
        "  cut          no row: none is longer than max_length = 1,024",
        "  left out     no row",
        "  duplicates   none",
        "  layout       joined: rows are laid end to end, without padding",
    ]
    padded = replace(clean, stats=replace(clean.stats, layout=BatchLayout.PADDED), fill=0.61)
    assert data_text(padded).splitlines()[-1] == (
        "  layout       padded: of 8 rows filled up to the longest, 61 % are tokens and the rest is padding"
    )


def test_str_and_repr_of_a_report() -> None:
    view.register_all()
    assert str(REPORT) == data_text(REPORT)
    assert REPORT._repr_html_() == data_html(REPORT)
    assert repr(REPORT) == "DataReport(rows.jsonl: 9812 of 10000 rows, 1500400 tokens)"


class _Balanced(HTMLParser):
    """Checks that tags close in order, and collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.learned = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "ins" in self.open:
            self.learned += data


def parsed(report: DataReport) -> _Balanced:
    parser = _Balanced()
    parser.feed(data_html(report))
    parser.close()
    assert not parser.open
    return parser


def test_the_html_says_the_same_and_escapes_the_rows() -> None:
    page = parsed(REPORT)
    for said in (
        "rows.jsonl: 9,812 of 10,000 lines",
        "no assistant turn (lines 3, 9, 17, 30, 31, …)",
        "filled to 96 %",
        "600 - 30,000",
        "cut at 1,024",
        "Hello & goodbye",
        "line 7,001: the longest, 2,000 tokens, 976 of them cut",
    ):
        assert said in page.text  # fmt: skip
    assert page.learned.startswith("what is learnedHi <b>!</b><end>bbb")
    assert "Hello" not in page.learned
    html = data_html(REPORT)
    assert "<details>" in html
    assert "<b>" not in html


def test_the_html_stays_small_whatever_the_rows_hold() -> None:
    nasty = Preview(
        row=10**9, pieces=(("<&>" * 4000, False), ("&" * 9000, True)) * 30, why="the longest", n_tokens=10**6
    )
    reasons = tuple(Skipped(reason="x" * 160, count=10**6, rows=(10**9,) * 5) for _ in range(41))
    bins = tuple((i * 10**6, i * 10**6 + 99, 10**9) for i in range(14))
    stats = replace(STATS, source="&" * 200, layout_because="<" * 200)
    report = replace(REPORT, stats=stats, previews=(nasty,) * 3, skipped=reasons, histogram=bins)
    assert len(data_html(report).encode()) < 15_000
    assert "35 other reasons" in data_text(report)
    parsed(report)


def test_colours_are_not_the_only_sign_and_work_on_any_page() -> None:
    html = data_html(REPORT)
    assert 'style="background:#426EBD40;color:inherit;text-decoration:underline"' in html
    # Text keeps the page's own colour.
    assert set(re.findall(r'[";]color:[^;"]*', html)) == {";color:inherit"}


@pytest.mark.parametrize("n_pieces", [1, 2, 7, 24, 200])
def test_long_rows_lose_their_middles_and_keep_each_turn(n_pieces: int) -> None:
    pieces = tuple((f"{i}" + "x" * 3000 + f"{i}", bool(i % 2)) for i in range(n_pieces))
    short = shortened(pieces)
    assert sum(len(text) for text, _ in short) <= 620
    for (text, learned), (whole, was_learned) in zip(short[:24], pieces, strict=False):
        assert (text[0], text[-1], learned) == (whole[0], whole[-1], was_learned)
    assert shortened((("short", True), ("y" * 595, False))) == [("short", True), ("y" * 595, False)]
    # What is short is left alone, and the room goes to what is long.
    (answer, _), (question, _) = shortened((("answer", True), ("q" * 2000, False)))
    assert answer == "answer"
    assert 580 <= len(question) <= 594
