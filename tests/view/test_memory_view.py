"""Memory as a line and as a bar."""

import itertools
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from nbqlora.core import display
from nbqlora.core.report import CardNow, VramReport
from nbqlora.core.specs import MemoryCategory as M
from nbqlora.view.memory import bar_html, meter_html, register_memory_views, vram_html, vram_text
from nbqlora.view.palette import COLOURS, RECLAIMABLE, category_of

GIB = 1 << 30


def bytes_of(n_gib: float) -> int:
    return round(n_gib * GIB)


T4 = VramReport(
    kind="cuda",
    name="Tesla T4",
    total_bytes=bytes_of(14.74),
    used_bytes=bytes_of(6.1),
    free_bytes=bytes_of(8.64),
    peak_bytes=bytes_of(9.8),
    by_category={
        M.OTHER_PROCESSES: bytes_of(0.2),
        M.CACHE: bytes_of(0.4),
        M.CONTEXT: bytes_of(0.3),
        M.LEAKED: bytes_of(0.02),
        M.THIS_PROCESS: bytes_of(5.18),
    },
    host_total_bytes=bytes_of(12.67),
    host_free_bytes=bytes_of(8.1),
    process_bytes=bytes_of(2.2),
    disk_free_bytes=bytes_of(41.4),
    disk_path=".",
    measured_by="torch",
)
CPU = replace(
    T4,
    kind="cpu",
    name="2 CPU cores",
    total_bytes=bytes_of(23.54),
    used_bytes=bytes_of(3.2),
    free_bytes=bytes_of(20.34),
    peak_bytes=bytes_of(1.24),
    by_category={M.THIS_PROCESS: bytes_of(0.9), M.OTHER_PROCESSES: bytes_of(2.3)},
    disk_free_bytes=bytes_of(7.96),
    measured_by="os",
)


class Reader(HTMLParser):
    """What is left of a page: tags, texts and the label that a screen reader speaks."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.items: list[str] = []
        self.label = ""
        self.styles: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        values = dict(attrs)
        self.styles.append(values.get("style") or "")
        if values.get("role") == "img":
            self.label = values["aria-label"] or ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "li":
            self.items.append(data)


def test_the_line_of_a_card() -> None:
    assert vram_text(T4) == (
        "vram  Tesla T4  6.1 of 14.7 GiB used · this process 5.2 · context 0.3 · cache 0.4 (reclaimable) "
        "· other processes 0.2 · peak 9.8 · RAM 8.1 of 12.7 free · disk 41 free"
    )


def test_the_line_of_a_cpu() -> None:
    assert vram_text(CPU) == (
        "ram   2 CPU cores  3.2 of 23.5 GiB used · this process 0.9 · other processes 2.3 · peak 1.2 · disk 8.0 free"
    )


def test_the_line_during_a_run() -> None:
    held = {M.WEIGHTS: bytes_of(4.1), M.ADAPTER: bytes_of(0.2), M.THIS_PROCESS: 0, M.OTHER_PROCESSES: bytes_of(0.7)}
    report = replace(T4, by_category=held, used_bytes=bytes_of(5), peak_bytes=0, name="A\nB")
    assert vram_text(report).startswith(
        "vram  A B  5.0 of 14.7 GiB used · weights 4.1 · adapter 0.2 · other processes 0.7 · RAM"
    )


def test_the_page_holds_the_same_figures() -> None:
    page = Reader(vram_html(T4))
    figures = ["this process 5.2 GiB", "context 0.30 GiB", "cache 0.40 GiB, reclaimable", "leaked 0.02 GiB"]
    figures += ["other processes 0.20 GiB", "free 8.6 GiB"]
    assert page.items == figures
    assert page.label == ", ".join(figures) + "; 14.7 GiB in all"
    html = vram_html(T4)
    assert "<strong>Tesla T4</strong> 6.1 of 14.7 GiB used · peak 9.8 · RAM 8.1 of 12.7 free · disk 41 free" in html


def test_every_text_is_escaped() -> None:
    evil = "<script>alert(1)</script>\" onload='x'"
    html = vram_html(replace(T4, name=evil, notes=(evil,))) + bar_html([(evil, GIB)], 2 * GIB)
    page = Reader(html)
    assert set(page.tags) == {"div", "strong", "ul", "li", "span", "p"}
    assert page.items[-2:] == [f"{evil} 1.0 GiB", "free 1.0 GiB"]


def test_the_largest_page_is_small() -> None:
    everything = dict.fromkeys(M, GIB)
    report = replace(T4, by_category=everything, used_bytes=12 * GIB, notes=("a note of a hundred letters " * 4,) * 4)
    assert len(vram_html(report).encode()) <= 7000
    assert len(meter_html(report).encode()) <= 2500


def test_widths_are_shares_of_the_whole() -> None:
    page = bar_html([("weights", GIB), ("nothing", 0), ("cache", 2 * GIB)], 4 * GIB)
    assert "width:25.00%" in page and "width:50.00%" in page and "nothing" not in page
    assert page.count("repeating-linear-gradient") == 2  # box and swatch of what can be reclaimed


def test_what_a_finished_run_holds_is_reclaimable_too() -> None:
    report = replace(T4, by_category={M.WEIGHTS: 4 * GIB, M.CACHE: GIB}, reclaimable=(M.WEIGHTS, M.CACHE))
    assert "weights 4.0 (reclaimable) · cache 1.0 (reclaimable)" in vram_text(report)
    assert Reader(vram_html(report)).items[:2] == ["weights 4.0 GiB, reclaimable", "cache 1.0 GiB, reclaimable"]
    assert vram_html(report).count("repeating-linear-gradient") == 4


def test_a_meter_is_the_line_and_a_bar_without_a_list() -> None:
    page = Reader(meter_html(T4))
    assert vram_text(T4) in meter_html(T4) and page.items == []
    assert page.label.startswith("this process 5.2 GiB, context 0.30 GiB, cache 0.40 GiB, reclaimable")


def test_a_budget_that_is_too_large() -> None:
    page = bar_html([("weights", 5 * GIB), ("activations", 5 * GIB)], 8 * GIB)
    assert page.count("width:50.00%") == 2 and "left:80.00%" in page
    assert Reader(page).items == ["weights 5.0 GiB", "activations 5.0 GiB", "over by 2.0 GiB"]


def test_an_empty_bar() -> None:
    assert Reader(bar_html([], 0)).items == ["free 0 MiB"]


def test_no_colour_is_bound_to_a_light_or_a_dark_page() -> None:
    text_colours = [s for style in Reader(vram_html(T4)).styles for s in style.split(";") if s.startswith("color:")]
    assert text_colours == []


def test_reports_show_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "_text", {})
    monkeypatch.setattr(display, "_html", {})
    assert str(T4) == repr(T4) == "VramReport(Tesla T4: 8.6 GiB free of 14.7 GiB)"
    register_memory_views()
    assert str(T4) == vram_text(T4)
    assert T4._repr_html_() == vram_html(T4)


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISION = {
    "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)
    ),
}  # fmt: skip


def lightness_and_hue(colour: str, vision: str) -> tuple[float, float, float]:
    """CIELAB under D65 of ``#rrggbb`` as seen with ``vision``."""
    srgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in srgb]
    r, g, b = (min(1, max(0, sum(m * c for m, c in zip(row, linear, strict=True)))) for row in VISION[vision])
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("vision", VISION)
def test_any_two_colours_can_be_told_apart(vision: str) -> None:
    assert set(COLOURS) == set(M) and set(M) >= RECLAIMABLE
    seen = {category: lightness_and_hue(colour, vision) for category, colour in COLOURS.items()}
    for one, other in itertools.combinations(M, 2):
        distance = sum((p - q) ** 2 for p, q in zip(seen[one], seen[other], strict=True)) ** 0.5
        assert distance > 13, (one, other)


def test_labels_name_their_category() -> None:
    assert all(category_of(category.label) is category for category in M)
    assert category_of("free") is None


TWO = replace(
    T4,
    cards=(
        CardNow(name="Tesla T4", total_bytes=bytes_of(14.74), used_bytes=bytes_of(6.1), own_bytes=bytes_of(0.5),
                workers_bytes=bytes_of(5.3)),
        CardNow(name="Tesla T4", total_bytes=bytes_of(14.74), used_bytes=0, own_bytes=None, workers_bytes=None),
    ),
)  # fmt: skip


def test_each_of_several_cards_has_its_line() -> None:
    head, *cards = vram_text(TWO).split("\n")
    assert head == vram_text(T4)
    assert cards == [
        "  card 0  Tesla T4  6.1 of 14.7 GiB used · this process 0.5 · workers of a run 5.3 · others 0.3",
        "  card 1  Tesla T4  0.0 of 14.7 GiB used",
    ]
    for page in (vram_html(TWO), meter_html(TWO)):
        assert all(line.strip() in page for line in cards)
    eight = replace(TWO, cards=TWO.cards[:1] * 8)
    assert len(vram_html(eight).encode()) <= 7000 and len(meter_html(eight).encode()) <= 2500
