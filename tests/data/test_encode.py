"""From rows to the data set that the trainer takes: what is cut, left out and counted, and what is said meanwhile."""

from collections.abc import Iterator
from typing import Any

import pytest

from nbqlora.core.errors import DataError
from nbqlora.data.encode import EncodedData, encode
from nbqlora.data.report import CUT_AWAY, NOTHING_TO_LEARN
from nbqlora.data.source import Rows
from nbqlora.data.tokens import IGNORED
from tests.data.small_rows import PACKED, PADDED, encoded, ids, pair
from tests.data.small_tokenizers import byte_level, words


def n_learned(data: EncodedData) -> list[int]:
    return [sum(label != IGNORED for label in row) for row in data.store.rows["labels"]]


def test_counts() -> None:
    data = encoded([pair(3, 2), pair(1, 8), pair(2, 4)])
    stats = data.stats
    assert (stats.n_rows, stats.n_sequences, stats.n_tokens, stats.n_supervised_tokens) == (3, 3, 6 + 10 + 7, 3 + 9 + 5)
    assert (stats.max_tokens, stats.n_truncated, stats.n_skipped, stats.n_eval_rows) == (10, 0, {}, 0)
    assert stats.percentiles == (6, 6, 7, 10, 10)
    assert (stats.source, stats.format, stats.layout) == ("list of rows", "prompt and completion", PADDED)
    assert data.report.stats == stats
    assert data.dataset.column_names == ["input_ids", "labels"]
    assert {str(feature.feature.dtype) for feature in data.dataset.features.values()} == {"int32"}
    assert data.dataset[0]["labels"] == [IGNORED] * 3 + data.dataset[0]["input_ids"][3:]
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
        pair(3, 7),  # 11 tokens: cut to 8, five words of the answer are left
        pair(7, 3),  # only the first word of the answer is left
        pair(8, 3),  # the answer begins after the cut
        pair(3, 4),  # 8 tokens: just fits
        {"prompt": "w1", "completion": ""},  # teaches its end only
        {"messages": None, "prompt": "w1 w2", "completion": "w3"},
    ]
    data = encoded(rows, max_length=8)
    assert data.store.rows["row"][:] == [1, 2, 3, 5, 6, 7]
    assert data.stats.n_truncated == 2
    assert data.stats.n_skipped == {CUT_AWAY: 1}
    assert [len(row) for row in ids(data)] == [6, 8, 8, 8, 2, 3]
    assert n_learned(data) == [3, 5, 1, 5, 1, 2]
    assert data.stats.max_tokens == 8
    assert (data.report.n_cut_tokens, data.report.n_cut_learned) == (3 + 3, 3 + 3)


def test_rows_that_teach_nothing_are_left_out_by_reason() -> None:
    tokenizer = byte_level("chatml")
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    good = {"messages": [ask, answer]}
    rows = [
        {"messages": [ask]},
        good,
        {"messages": [{**ask, "content": "a" * 200}, answer]},
        good,
        {"messages": 7},
        good,
    ]
    data = encoded([*rows, good], tokenizer=tokenizer, max_length=100)
    assert data.store.rows["row"][:] == [2, 4, 6, 7]
    reasons = {"no assistant turn": 1, CUT_AWAY: 1, "messages is int, not a list of {role, content}": 1}
    assert data.stats.n_skipped == reasons
    assert {s.reason: s.rows for s in data.report.skipped} == dict(zip(reasons, [(1,), (3,), (5,)], strict=True))
    everything = encoded([*rows, good], tokenizer=tokenizer, max_length=100, assistant_only_loss=False)
    assert everything.store.rows["row"][:] == [2, 3, 4, 6, 7]
    assert everything.stats.n_truncated == 1
    # One token, which nothing predicts.
    alone = encoded([{"text": "w1"}, {"text": "w2 w3"}], tokenizer=_without_end())
    assert alone.stats.n_skipped == {NOTHING_TO_LEARN: 1}


def _without_end() -> Any:
    tokenizer = words()
    tokenizer.eos_token = None
    return tokenizer


def test_more_than_half_left_out_is_an_error() -> None:
    half = [pair(8, 3), pair(1, 3), pair(9, 3), pair(2, 3)]
    assert encoded(half, max_length=8).stats.n_skipped == {CUT_AWAY: 2}
    with pytest.raises(DataError) as caught:
        encoded([*half, {"prompt": "a", "completion": None}], max_length=8)
    assert str(caught.value) == (
        "list of rows: 3 of 5 rows cannot be used\n"
        "  2 x the answer begins after max_length (rows 1 and 3)\n"
        "  1 x nothing (None or NaN) in completion (row 5)\n"
        "  max_length is 8"
    )
    with pytest.raises(DataError) as caught:
        encoded([pair(9, 1)], max_length=8)
    assert str(caught.value).startswith("list of rows: 1 of 1 rows cannot be used\n  1 x the answer begins after")


def test_a_hundred_bad_rows_at_the_start_are_enough() -> None:
    n_given = 0

    def read() -> Iterator[tuple[int, dict[str, Any]]]:
        nonlocal n_given
        for number in range(1, 10_001):
            n_given = number
            yield number, {"messages": [{"role": "user", "content": "a"}] if number % 4 else None}

    with pytest.raises(DataError) as caught:
        encode(Rows(source="x", n_rows=None, read=read, unit="line"), byte_level(), max_length=8, layout=PADDED)
    assert str(caught.value) == (
        "x: none of the first 100 lines can be used\n"
        "  75 x no assistant turn (lines 1, 2, 3, 5, 6, …)\n"
        "  25 x nothing (None or NaN) in messages (lines 4, 8, 12, 16, 20, …)"
    )
    assert n_given == 100


def test_a_tokenizer_without_template_takes_text_only() -> None:
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    for rows in ([{"messages": messages}], [{"prompt": messages[:1], "completion": messages[1:]}]):
        with pytest.raises(DataError) as caught:
            encoded(rows)
        assert str(caught.value) == (
            "this model's tokenizer has no chat template; "
            'chat_template_path = "plain" uses a plain one (### User / ### Assistant)'
        )


def test_the_fingerprint_is_of_tokens_and_labels_in_order() -> None:
    rows = [pair(1 + i % 7, 2, first=i) for i in range(400)]
    given = encoded(rows).stats.fingerprint
    assert len(given) == 32
    assert encoded([*rows]).stats.fingerprint == given
    assert encoded(rows, max_length=63).stats.fingerprint == given
    others = [rows[::-1], rows[:-1], [*rows[:-1], pair(1, 2)]]
    changed = {encoded(other).stats.fingerprint for other in others}
    changed.add(encoded(rows, assistant_only_loss=False).stats.fingerprint)
    changed.add(encoded(rows, max_length=5).stats.fingerprint)
    assert len(changed | {given}) == 6


def test_nothing_is_drawn_and_progress_is_said(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbqlora.data import encode as module

    monkeypatch.setattr(module, "_SAY_SECONDS", 0.0)
    rows, said = [pair(1, 2)] * 600, []
    encoded(rows, layout=PACKED, say=said.append)
    assert capfd.readouterr() == ("", "")
    assert said == [f"tokenized {n} of 600 rows, under 1 min left" for n in (100, 350, 600)]
    said.clear()
    unknown = Rows(source="x", n_rows=None, read=lambda: iter(enumerate(rows, 1)), unit="line")
    encode(unknown, words(), max_length=8, layout=PADDED, say=said.append)
    assert said[-1] == "tokenized 600 lines"


def test_rows_of_a_dataset_and_a_frame_are_the_same(demo_tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}
    rows = [{"messages": [ask, answer]}, {"messages": [ask, {**answer, "content": "c"}]}]
    expected = encoded(rows, tokenizer=demo_tokenizer).dataset[:]
    for source in (datasets.Dataset.from_list(rows), pandas.DataFrame(rows)):
        assert encoded(source, tokenizer=demo_tokenizer).dataset[:] == expected


def test_the_users_choice_about_threads_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for given in (None, "true", "false"):
        if given is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", given)
        encoded([pair(1, 2)] * 300)
        assert os.environ.get("TOKENIZERS_PARALLELISM") == given
