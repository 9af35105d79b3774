"""The table of usual models as a person reads it."""

from __future__ import annotations

from nbqlora.core.memory_table import MemoryRow, MemoryTable
from nbqlora.view import register_all

GIB = 1 << 30
SMALL = MemoryRow(
    shape="8B", like="Llama-3.1-8B", minimum_bytes=7 * GIB, offloaded_bytes=6 * GIB, host_bytes=GIB // 2,
    recommended_bytes=12 * GIB, recommended_rows=2, all_kept_bytes=50 * GIB, slower=0.94, cards_gb=(10, 16),
    rule_of_thumb="16 / 24 GB, batch 2-4", on_80_gb="16 rows at once, 32 keep: 54.0 GiB, as fast as with all memory",
)  # fmt: skip
LARGE = MemoryRow(
    shape="70B", like="<70B>", minimum_bytes=42 * GIB, offloaded_bytes=41 * GIB, host_bytes=3 * GIB,
    recommended_bytes=70 * GIB, recommended_rows=1, all_kept_bytes=300 * GIB, slower=1.1, cards_gb=(48, None),
    rule_of_thumb="80+ / 2 x 80 GB, batch 1", on_80_gb="1 row at once, 80 keep: 73.3 GiB, 7 % slower",
)  # fmt: skip
TABLE = MemoryTable(
    rows=(SMALL, LARGE), max_length=2048, card="A100", dtype="bf16", within=0.1, settings={"lora_r": 32}
)


def test_as_text() -> None:
    register_all()
    assert str(TABLE) == (
        "VRAM that a run allocates, rows of 2048 tokens, bf16 on a card like A100, lora_r = 32\n"
        "  model              minimum           inputs in host RAM      recommended       rows at once  rule of thumb\n"
        "  8B (Llama-3.1-8B)  7.0 GiB (10 GB)   6.0 GiB + 0.50 GiB RAM  12.0 GiB (16 GB)  2             "
        "16 / 24 GB, batch 2-4\n"
        "  70B (<70B>)        42.0 GiB (48 GB)  41.0 GiB + 3.0 GiB RAM  70.0 GiB          1             "
        "80+ / 2 x 80 GB, batch 1\n"
        "  minimum: the least with which there is a plan, one row at a time, all layers computed again; a step takes "
        "94 %,\n    110 % longer than with all memory\n"
        "  recommended: the least with which a step takes at most 10 % longer than with all memory, and its rows at "
        "once;\n    both without host RAM\n"
        "  in brackets: the smallest usual card with so much free, beside 0.4 GiB for CUDA and 0.5 GiB in reserve\n"
        "  bytes are counted tensor by tensor; seconds are a forecast, checked on an H100 alone\n"
        "  70B on one 80 GB card: 1 row at once, 80 keep: 73.3 GiB, 7 % slower"
    )


def test_as_html() -> None:
    register_all()
    found = TABLE._repr_html_()
    assert found is not None and "<script" not in found
    assert "&lt;70B&gt;" in found and "<70B>" not in found
    assert found.count("<tr>") == 3 and found.count("<td") == 10 and "one 80 GB card" in found
