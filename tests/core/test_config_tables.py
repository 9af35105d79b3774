"""The tables ``trl`` and ``peft``: what goes through, and what has an owner."""

from typing import Any

import pytest

from nbqlora.core.checks import Check, of_type
from nbqlora.core.config import FinetuneConfig, validate
from nbqlora.core.errors import ConfigError
from nbqlora.core.names import REFUSED_PEFT, REFUSED_TRL
from nbqlora.core.request import CellRequest

FIELDS = {
    "trl": dict.fromkeys(
        ["learning_rate", "logging_steps", "save_steps", "adam_beta1", "neftune_noise_alpha"], of_type(Any)
    ),
    "peft": dict.fromkeys(["r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern"], of_type(Any)),
}


def validated(**tables: Any) -> FinetuneConfig:
    request = CellRequest(options={"model": "demo", "data": "demo", **tables})
    return validate(request, table_fields=FIELDS.__getitem__)


def problems(**tables: Any) -> list[tuple[str, str, str]]:
    with pytest.raises(ConfigError) as caught:
        validated(**tables)
    return [(p.key, p.message, p.hint) for p in caught.value.problems]


def test_fields_of_the_libraries_go_through() -> None:
    config = validated(trl={"adam_beta1": 0.8}, peft={"use_dora": True})
    assert (config.trl, config.peft) == ({"adam_beta1": 0.8}, {"use_dora": True})


def test_the_libraries_are_asked_only_for_tables_that_are_there() -> None:
    def never(table: str) -> dict[str, Check]:
        raise AssertionError(f"asked for {table}")

    validate(CellRequest(options={"model": "demo", "data": "demo", "trl": {}}), table_fields=never)


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ({"trl": {"logging_step": 1}}, ("trl.logging_step", "unknown key", "did you mean trl.logging_steps?")),
        ({"peft": {"use_dorra": True}}, ("peft.use_dorra", "unknown key", "did you mean peft.use_dora?")),
        ({"trl": {"zzz": 1}}, ("trl.zzz", "unknown key", "")),
        ({"trl": {3: 1}}, ("trl.3", "unknown key", "")),
        ({"trl": {"learning_rate": 1}}, ("trl.learning_rate", "is an option of its own",
                                         "write learning_rate at the top level")),
        ({"peft": {"lora_alpha": 1}}, ("peft.lora_alpha", "is an option of its own",
                                       "write lora_alpha at the top level")),
        ({"trl": {"model": "x"}}, ("trl.model", "is an option of its own", "write model at the top level")),
        ({"trl": {"lr": 1}}, ("trl.lr", "unknown key", "did you mean learning_rate at the top level?")),
        ({"peft": {"rank": 8}}, ("peft.rank", "unknown key", "did you mean lora_r at the top level?")),
        ({"trl": {"lerning_rate": 1}}, ("trl.lerning_rate", "unknown key",
                                        "did you mean learning_rate at the top level?")),
        # What would be refused is not proposed.
        ({"trl": {"save_step": 1}}, ("trl.save_step", "unknown key", "")),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_key(tables: dict[str, Any], problem: tuple[str, str, str]) -> None:
    found = problems(**tables)
    if problem[0] == "trl.save_step":
        assert len(found) == 1
        assert "save_steps" not in found[0][2]
    else:
        assert found == [problem]


@pytest.mark.parametrize(
    ("table", "key", "reason"),
    [
        *(("trl", key, why) for key, why in REFUSED_TRL.items()),
        *(("peft", key, why) for key, why in REFUSED_PEFT.items()),
    ],
)
def test_a_refused_key_gets_its_reason(table: str, key: str, reason: str) -> None:
    assert reason
    assert problems(**{table: {key: 1}}) == [(f"{table}.{key}", "is not accepted", reason)]


def test_secrets_and_silent_switches_are_refused() -> None:
    assert {"hub_token", "push_to_hub", "logging_nan_inf_filter", "torch_compile_mode"} <= set(REFUSED_TRL)


def test_every_refused_key_is_a_field_of_the_installed_library() -> None:
    from nbqlora.run.tables import table_fields

    assert set(REFUSED_TRL) <= table_fields("trl").keys()
    assert set(REFUSED_PEFT) <= table_fields("peft").keys()


def test_no_refused_key_is_an_option_of_its_own() -> None:
    from dataclasses import fields

    assert not {f.name for f in fields(FinetuneConfig)} & {*REFUSED_TRL, *REFUSED_PEFT}


@pytest.mark.parametrize(
    ("table", "key", "value", "said"),
    [
        ("trl", "logging_steps", "often", 'expected a number, got "often"'),
        ("trl", "save_total_limit", "3", 'expected a whole number, got "3"; leave out the quotes'),
        ("trl", "save_total_limit", True, "expected a whole number, got true"),
        ("trl", "report_to", 3, "expected text or a list, got 3"),
        ("peft", "use_dora", "yes", 'expected true or false, got "yes"'),
        ("peft", "rank_pattern", [1], "expected a table, got [1]"),
    ],
)
def test_a_value_has_the_type_that_the_library_says(table: str, key: str, value: Any, said: str) -> None:
    from nbqlora.run.tables import table_fields

    assert table_fields(table)[key](value) == said


def test_what_an_annotation_leaves_open_is_the_librarys_to_check() -> None:
    from nbqlora.run.tables import table_fields

    trl, peft = table_fields("trl"), table_fields("peft")
    good = [(trl, "logging_steps", 3), (trl, "neftune_noise_alpha", None), (trl, "eval_strategy", "steps"),
            (trl, "lr_scheduler_kwargs", {"power": 2}), (peft, "init_lora_weights", "gaussian"),
            (peft, "layers_to_transform", (1, 2)), (peft, "bias", "none")]  # fmt: skip
    assert [key for fields, key, value in good if fields[key](value)] == []


def test_another_table_is_told_the_two_that_there_are() -> None:
    said = [("lora", "unknown table", "there are [trl] and [peft]; other options stand above")]
    assert problems(lora={"r": 8}) == said
