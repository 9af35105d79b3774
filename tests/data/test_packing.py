"""Rows in packs, joined or padded: each row whole, once, and found again by its tokens."""

import numpy as np

from nbqlora.core.specs import BatchLayout
from nbqlora.data.encode import EncodedData
from nbqlora.data.tokens import IGNORED
from tests.data.small_rows import JOINED, PACKED, PADDED, encoded, ids, pair


def documents(data: EncodedData) -> list[list[int]]:
    """The rows that the packs are made of."""
    found = []
    for pack in data.dataset:
        assert sum(pack["seq_lengths"]) == len(pack["input_ids"]) == len(pack["labels"])
        at = 0
        for length in pack["seq_lengths"]:
            found.append(pack["input_ids"][at : at + length])
            at += length
    return found


def test_packing_keeps_every_row_whole_and_once() -> None:
    # More than 1,000 rows: TRL packs in batches of a thousand.
    rows = [pair(1 + i % 7, 1 + i % 11, first=i) for i in range(1500)]
    plain, packed = encoded(rows, max_length=48), encoded(rows, max_length=48, layout=PACKED)
    assert sorted(documents(packed)) == sorted(ids(plain))
    assert ids(packed) == ids(plain)
    n_packs = len(packed.dataset)
    assert packed.stats.n_sequences == n_packs
    assert (packed.stats.n_rows, packed.stats.n_tokens) == (1500, plain.stats.n_tokens)
    assert packed.report.fill == packed.stats.n_tokens / (48 * n_packs)
    lengths = [len(pack) for pack in packed.dataset["input_ids"]]
    assert max(lengths) <= 48
    assert sum(lengths) == plain.stats.n_tokens
    # Two batches, each with at most one pack that is not nearly full.
    assert n_packs <= plain.stats.n_tokens / 48 * 1.02 + 2
    for pack in packed.dataset.select(range(20)):
        assert all(label in (IGNORED, token) for token, label in zip(pack["input_ids"], pack["labels"], strict=True))
        # A document's first token is predicted by nothing, least of all by the document before it.
        starts = [sum(pack["seq_lengths"][:i]) for i in range(len(pack["seq_lengths"]))]
        assert all(pack["labels"][at] == IGNORED for at in starts)


def test_packing_never_sees_a_row_longer_than_a_pack() -> None:
    """TRL's packing would cut such a row in silence; here it was cut, and counted, before."""
    data = encoded([pair(2, 40, first=3), pair(2, 3), pair(1, 4)], max_length=16, layout=PACKED)
    assert data.stats.n_truncated == 1
    assert sorted(data.dataset["seq_lengths"]) == [[6, 6], [16]]
    assert next(d for d in documents(data) if len(d) == 16) == ids(data)[0]


def test_the_layout_changes_without_tokenizing_again() -> None:
    rows = [pair(1 + i % 7, 1 + i % 11, first=i) for i in range(60)]
    direct = {layout: encoded(rows, max_length=48, layout=layout) for layout in BatchLayout}
    for given in direct.values():
        for layout, expected in direct.items():
            data = given.with_layout(layout, "the probe said so")
            assert data.dataset[:] == expected.dataset[:]
            assert (data.stats.layout, data.stats.layout_because) == (layout, "the probe said so")
            assert data.stats.n_sequences == len(expected.dataset)
            assert data.report.stats == data.stats
            assert data.report.fill == expected.report.fill
            assert data.stats.fingerprint == expected.stats.fingerprint
    assert direct[JOINED].report.fill == 1.0
    assert direct[PADDED].report.fill < direct[PACKED].report.fill < 1.0


def test_rows_are_found_by_their_tokens() -> None:
    rows = [pair(20, 1), pair(1, 2), pair(2, 2, first=9), pair(1, 2), pair(1, 30)]
    data = encoded(rows, max_length=16, layout=PACKED)
    kept = ids(data)
    assert data.find_rows([kept[1]]) == (3,)
    assert data.find_rows([kept[0], kept[3]]) == (2, 4, 5)
    assert data.find_rows([]) == ()
    assert data.find_rows([[1, 2, 3]]) == ()
    assert data.find_rows(documents(data)) == (2, 3, 4, 5)
    assert data.find_rows([np.array(kept[1])]) == (3,)
    many = encoded([pair(1 + i % 7, 3, first=i) for i in range(700)])
    tokens = ids(many)
    assert many.find_rows([tokens[650]]) == tuple(n for n, row in enumerate(tokens, 1) if row == tokens[650])
