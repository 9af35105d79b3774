"""What people call an option elsewhere, or misspell, leads to ours."""

from dataclasses import fields
from typing import Any

import pytest

from nbqlora.core.config import FinetuneConfig, validate
from nbqlora.core.errors import ConfigError
from nbqlora.core.names import ALIASES
from nbqlora.core.request import CellRequest

OPTIONS = {f.name for f in fields(FinetuneConfig)}


def check(**options: Any) -> list[tuple[str, str, str]]:
    with pytest.raises(ConfigError) as caught:
        validate(CellRequest(options=options), table_fields=lambda table: {})
    return [(p.key, p.message, p.hint) for p in caught.value.problems]


@pytest.mark.parametrize(("written", "meant"), ALIASES.items())
def test_other_names_lead_to_ours(written: str, meant: str) -> None:
    assert meant in OPTIONS
    assert (written, "unknown key", f"did you mean {meant}?") in check(model="m", data="d", **{written: 1})


@pytest.mark.parametrize(
    ("written", "meant"),
    [("lora_rnk", "lora_r"), ("learning_rte", "learning_rate"), ("Max_Length", "max_length"),
     ("BATCH-SIZE", "effective_batch_size"), ("load_in_4_bit", "load_in_4bit"), ("LR", "learning_rate")],
)  # fmt: skip
def test_misspelled_names_lead_to_ours(written: str, meant: str) -> None:
    assert check(model="m", data="d", **{written: 1}) == [(written, "unknown key", f"did you mean {meant}?")]


def test_a_name_that_resembles_none_gets_no_guess() -> None:
    assert check(model="m", data="d", zzz=1) == [("zzz", "unknown key", "")]


def test_another_name_of_a_required_option_is_one_problem_not_two() -> None:
    assert check(base_model="m", dataset="d") == [
        ("base_model", "unknown key", "did you mean model?"),
        ("dataset", "unknown key", "did you mean data?"),
    ]
