"""From rows to the data set that the trainer takes: what is cut, left out, counted and packed."""

import time
from typing import Any

import pytest

from nbqlora.core.errors import DataError
from nbqlora.data.encode import CUT_AWAY, NOTHING_TO_LEARN, EncodedData, encode
from nbqlora.data.render import IGNORED
from nbqlora.data.rows import read_rows
from tests.data.small_tokenizers import byte_level, words


def pair(prompt: int, completion: int, first: int = 0) -> dict[str, str]:
    """A row of ``prompt + completion`` words and the end token."""
    names = [f"w{(first + i) % 50}" for i in range(prompt + completion)]
    return {"prompt": " ".join(names[:prompt]), "completion": " " + " ".join(names[prompt:])}


def encoded(rows: Any, *, max_length: int = 64, **options: Any) -> EncodedData:
    return encode(read_rows(rows), options.pop("tokenizer", None) or words(), max_length=max_length, **options)


def test_counts() -> None:
    data = encoded([pair(3, 2), pair(1, 8), pair(2, 4)])
    stats = data.stats
    assert (stats.n_rows, stats.n_sequences, stats.n_tokens, stats.n_supervised_tokens) == (3, 3, 6 + 10 + 7, 3 + 9 + 5)
    assert (stats.max_tokens, stats.n_truncated, stats.n_skipped, stats.n_eval_rows) == (10, 0, {}, 0)
    assert stats.percentiles == (6, 6, 7, 10, 10)
    assert stats.source == "list of rows"
    assert data.row_numbers == (1, 2, 3)
    assert data.dataset.column_names == ["input_ids", "labels"]
    assert data.dataset["input_ids"][:] == [row.input_ids for row in data.rows]
    assert data.dataset["labels"][:] == [row.labels for row in data.rows]
    assert repr(data) == "EncodedData(list of rows: 3 rows, 23 tokens)"


@pytest.mark.parametrize(
    ("lengths", "percentiles"),
    [
        ([7], (7, 7, 7, 7, 7)),
        ([5, 9], (5, 5, 5, 9, 9)),
        (list(range(5, 26)), (6, 10, 15, 20, 24)),
        ([30, *[5] * 99], (5, 5, 5, 5, 5)),
    ],
)
def test_percentiles(lengths: list[int], percentiles: tuple[int, ...]) -> None:
    assert encoded([pair(2, n - 3) for n in lengths]).stats.percentiles == percentiles


def test_truncation_and_what_is_left_out() -> None:
    rows = [
        pair(3, 2),  # 6 tokens: fits
        pair(3, 7),  # 11 tokens: cut to 8, four words of the answer are left
        pair(7, 3),  # only the first word of the answer is left
        pair(8, 3),  # the answer begins after the cut
        pair(3, 4),  # 8 tokens: just fits
        {"prompt": "w1", "completion": ""},  # teaches its end only
        {"messages": None, "prompt": "w1 w2", "completion": "w3"},
    ]
    data = encoded(rows, max_length=8)
    assert data.row_numbers == (1, 2, 3, 5, 6, 7)
    assert data.stats.n_truncated == 2
    assert data.stats.n_skipped == {CUT_AWAY: 1}
    assert [len(row.input_ids) for row in data.rows] == [6, 8, 8, 8, 2, 3]
    assert [row.n_supervised for row in data.rows] == [3, 5, 1, 5, 1, 2]
    assert data.stats.max_tokens == 8
    assert all(len(row.labels) == len(row.input_ids) for row in data.rows)


def test_rows_that_teach_nothing_are_left_out_by_reason() -> None:
    tokenizer = byte_level("chatml")
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"messages": m} for m in ([ask], [ask, answer], [ask, ask], [ask, {**ask, "content": "a" * 200}, answer])]
    data = encoded(rows, tokenizer=tokenizer, max_length=100)
    assert data.row_numbers == (2,)
    assert data.stats.n_skipped == {NOTHING_TO_LEARN: 2, CUT_AWAY: 1}
    everything = encoded(rows, tokenizer=tokenizer, max_length=100, assistant_only_loss=False)
    assert (everything.row_numbers, everything.stats.n_skipped) == ((1, 2, 3, 4), {})
    assert everything.stats.n_truncated == 1


def test_all_rows_left_out_is_an_error() -> None:
    with pytest.raises(DataError) as caught:
        encoded([pair(8, 3), pair(9, 3)], max_length=8)
    assert str(caught.value) == (
        "list of rows: no row teaches anything: 2 x the answer begins after max_length; max_length is 8"
    )
    ask = {"role": "user", "content": "a"}
    with pytest.raises(DataError) as caught:
        encoded([{"messages": [ask]}, pair(9, 1), {"messages": [ask]}], max_length=8, tokenizer=byte_level("chatml"))
    assert str(caught.value) == (
        "list of rows: no row teaches anything: 2 x nothing to learn from, 1 x the answer begins after max_length; "
        "max_length is 8"
    )


def test_a_wrong_row_is_named_by_its_number() -> None:
    with pytest.raises(DataError, match=r"^row 2 of list of rows has the columns text; rows need"):
        encoded([pair(1, 1), {"text": "a"}])


def test_a_tokenizer_without_template_takes_text_only() -> None:
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    with pytest.raises(DataError, match=r"^this model's tokenizer has no chat template; give rows with prompt and"):
        encoded([{"messages": messages}])
    with pytest.raises(DataError, match=r"^this model's tokenizer has no chat template; give rows with prompt and"):
        encoded([{"prompt": messages[:1], "completion": messages[1:]}])
    with pytest.raises(DataError, match=r"^row 2 of list of rows: the chat template refuses this conversation"):
        encoded([pair(1, 1), {"messages": messages}])


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
    plain, packed = encoded(rows, max_length=48), encoded(rows, max_length=48, packing=True)
    assert sorted(documents(packed)) == sorted(row.input_ids for row in plain.rows)
    assert packed.rows == plain.rows
    n_packs = len(packed.dataset)
    assert packed.stats.n_sequences == n_packs
    assert (packed.stats.n_rows, packed.stats.n_tokens) == (1500, plain.stats.n_tokens)
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
    rows = [pair(2, 40, first=3), pair(2, 3), pair(1, 4)]
    data = encoded(rows, max_length=16, packing=True)
    assert data.stats.n_truncated == 1
    assert sorted(data.dataset["seq_lengths"]) == [[6, 6], [16]]
    longest = next(d for d in documents(data) if len(d) == 16)
    assert longest == data.rows[0].input_ids


def test_packing_leaves_out_what_teaches_nothing() -> None:
    data = encoded([pair(20, 1), pair(1, 2)], max_length=16, packing=True)
    assert data.stats.n_skipped == {CUT_AWAY: 1}
    assert documents(data) == [data.rows[0].input_ids]
    assert data.row_numbers == (2,)


def test_packing_draws_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    encoded([pair(1, 2)] * 50, packing=True)
    assert capfd.readouterr() == ("", "")


def test_rows_are_found_by_their_tokens() -> None:
    rows = [pair(20, 1), pair(1, 2), pair(2, 2, first=9), pair(1, 2), pair(1, 30)]
    data = encoded(rows, max_length=16, packing=True)
    assert data.row_numbers == (2, 3, 4, 5)
    assert data.find_rows([data.rows[1].input_ids]) == (3,)
    assert data.find_rows([data.rows[0].input_ids, data.rows[3].input_ids]) == (2, 4, 5)
    assert data.find_rows([]) == ()
    assert data.find_rows([[1, 2, 3]]) == ()
    assert data.find_rows(documents(data)) == (2, 3, 4, 5)


def test_padded_and_plain_rows_of_a_dataset_are_the_same(demo_tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}
    rows = [{"messages": [ask, answer]}, {"messages": [ask, {**answer, "content": "c"}]}]
    expected = encoded(rows, tokenizer=demo_tokenizer).rows
    for source in (datasets.Dataset.from_list(rows), pandas.DataFrame(rows)):
        assert encoded(source, tokenizer=demo_tokenizer).rows == expected


def test_nothing_in_a_data_frame_is_named() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"prompt": ["w1", "w2"], "completion": ["w3", None]})
    with pytest.raises(DataError) as caught:
        encoded(frame)
    assert str(caught.value) == (
        "row 2 of DataFrame of 2 rows has nothing (None or NaN) in completion; "
        'rows need "messages", or "prompt" and "completion"'
    )


def test_ten_thousand_rows_take_seconds(demo_tokenizer: Any) -> None:
    turns = [("user", "What is {i}?"), ("assistant", "word " * 40), ("user", "And then?"), ("assistant", "word " * 40)]
    rows = [{"messages": [{"role": r, "content": c.format(i=i)} for r, c in turns]} for i in range(10_000)]
    begun = time.perf_counter()
    data = encoded(rows, tokenizer=demo_tokenizer, max_length=256)
    assert time.perf_counter() - begun < 15
    assert data.stats.n_rows == 10_000
