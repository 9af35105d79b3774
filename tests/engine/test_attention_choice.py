"""Which kind of attention is chosen, in which words; boundaries of documents."""

from __future__ import annotations

import pytest
import torch

from nbqlora.engine import attention, attention_operators
from nbqlora.engine.attention import (
    AttentionKind,
    Documents,
    choose_attention,
    count_documents,
    documents_from_positions,
)

GIVEN = {"dtype": torch.float16, "head_dim": 128, "window": None, "softcap": None, "dense": False}


@pytest.mark.parametrize(
    ("card", "given", "kind", "reason"),
    [
        ((7, 5), {}, "efficient", "memory-efficient, varlen, keys expanded: flash needs capability 8.0"),
        ((7, 5), {"dense": True}, "efficient", "memory-efficient, keys expanded: flash needs capability 8.0"),
        ((7, 5), {"head_dim": 256}, "efficient", "memory-efficient, varlen, keys expanded: flash needs capability 8.0"),
        (
            (7, 5),
            {"dtype": torch.bfloat16},
            "sdpa",
            "one causal SDPA a document: flash needs capability 8.0; memory-efficient in bf16 needs capability 8.0",
        ),
        ((8, 0), {}, "flash", "flash, varlen: capability 8.0"),
        ((8, 6), {"dtype": torch.bfloat16, "window": 64, "head_dim": 96}, "flash", "flash, varlen: capability 8.6"),
        ((8, 0), {"dense": True}, "flash", "flash: capability 8.0"),
        ((9, 0), {"head_dim": 80}, "flash", "flash, varlen: capability 9.0"),
        ((9, 0), {"dense": True}, "cudnn", "cuDNN: measured faster than flash on capability 9.0"),
        ((9, 0), {"dense": True, "window": 64}, "flash", "flash: capability 9.0"),
        ((9, 0), {"dense": True, "head_dim": 256}, "flash", "flash: capability 9.0"),
        (
            (9, 0),
            {"dtype": torch.float32},
            "efficient",
            "memory-efficient, varlen, keys expanded: flash takes fp16 and bf16 only",
        ),
        (
            (9, 0),
            {"head_dim": 512},
            "efficient",
            "memory-efficient, varlen, keys expanded: flash takes heads of at most 256 in steps of 8, not 512",
        ),
        (
            (9, 0),
            {"head_dim": 20},
            "sdpa",
            "one causal SDPA a document: flash takes heads of at most 256 in steps of 8, not 20; "
            "memory-efficient takes heads in steps of 8, not 20",
        ),
        ((9, 0), {"softcap": 50.0}, "math", "written out, one document at a time: no kernel caps scores"),
        (None, {"dtype": torch.float32}, "sdpa", "one causal SDPA a document: a CPU"),
        (None, {"softcap": 50.0}, "math", "written out, one document at a time: no kernel caps scores"),
    ],
)
def test_the_kind_and_its_reason(
    card: tuple[int, int] | None, given: dict[str, object], kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CUDNN_IS_FASTER", frozenset({(9, 0)}))
    device = "cuda" if card else "cpu"
    chosen = choose_attention(device_type=device, capability=card, **{**GIVEN, **given})
    assert chosen == (AttentionKind(kind), reason)


@pytest.mark.parametrize("family", attention_operators.OPERATORS)
def test_this_torch_has_the_operators_as_they_are_called(family: str) -> None:
    assert attention_operators.lacks(family) == ""


OLD = (
    "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor philox_seed, Tensor philox_offset, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)"
)


@pytest.mark.parametrize(
    ("schema", "known"),
    [
        (OLD, True),
        (OLD.replace(", *,", ", int extra=0, *, bool other=False,"), True),
        (OLD.replace(", *,", ", int extra, *,"), False),
        (OLD.replace(", *,", ", *, bool other,"), False),
        (OLD.replace("window_size_left", "window_left"), False),
        (OLD.replace("Tensor logsumexp", "Tensor lse"), False),
        (OLD.replace("SymInt max_q, SymInt max_k", "SymInt max_k, SymInt max_q"), False),
        (OLD.replace(", Tensor philox_seed, Tensor philox_offset", ""), False),
        (None, False),
    ],
)
def test_an_operator_that_changed_is_not_called(
    schema: str | None, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, name = attention_operators.schema_of, "_flash_attention_backward"
    found = torch._C.parse_schema(schema) if schema else None
    monkeypatch.setattr(attention_operators, "schema_of", lambda asked: found if asked == name else real(asked))
    kind, reason = choose_attention(device_type="cuda", capability=(9, 0), **GIVEN)
    if known:
        assert (kind, reason) == (AttentionKind.FLASH, "flash, varlen: capability 9.0")
        return
    problem = "takes other arguments (_flash_attention_backward)" if schema else None
    expected = f"this torch's private operator {problem}" if problem else f"this torch has no private operator {name}"
    assert (kind, reason) == (AttentionKind.EFFICIENT, f"memory-efficient, varlen, keys expanded: {expected}")


def test_without_any_known_operator_a_card_takes_a_document_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_operators, "schema_of", lambda _: None)
    kind, reason = choose_attention(device_type="cuda", capability=(7, 5), **GIVEN)
    missing = "this torch has no private operator _efficient_attention_forward"
    assert (kind, reason) == (
        AttentionKind.SDPA,
        f"one causal SDPA a document: flash needs capability 8.0; {missing}",
    )


POSITIONS = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5], [7, 8, 0, 1, 2, 0]])


@pytest.mark.parametrize("size", [7, 8, 20])
def test_documents_begin_with_rows_and_where_positions_restart(size: int) -> None:
    assert count_documents(POSITIONS) == 7
    found = documents_from_positions(POSITIONS, max_documents=size)
    assert found.dtype == torch.int32
    assert found.tolist() == [0, 3, 4, 6, 12, 14, 17, *[18] * (size - 6)]
    assert POSITIONS[2, 0] == 7  # not written to


def test_documents_beyond_the_size_join_the_last() -> None:
    assert documents_from_positions(POSITIONS, max_documents=3).tolist() == [0, 3, 4, 18]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows, seq and max_tokens are at least 1, not 0, 6, 4"),
        ({"cu_seqlens": None, "lengths": None}, "documents of 6 tokens are longer than max_tokens=4"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 6])},
            r"cu_seqlens is contiguous int32 \[n_docs \+ 1\], not torch.int64 \[3\]",
        ),
        ({"lengths": (2, 3)}, "documents have 5 tokens, rows have 6"),
        ({"lengths": (1, 5)}, "a document has 5 tokens, more than max_tokens=4"),
    ],
)
def test_documents_that_do_not_fit(change: dict[str, object], message: str) -> None:
    given = {"rows": 1, "seq": 6, "cu_seqlens": torch.tensor([0, 2, 6]).int(), "max_tokens": 4, "lengths": (2, 4)}
    Documents(**given)
    with pytest.raises(ValueError, match=message):
        Documents(**{**given, **change})
