"""The tables ``trl`` and ``peft``: what goes through, and what has an owner."""

from typing import Any

import pytest

from nbqlora.core.config import FinetuneConfig, validate
from nbqlora.core.errors import ConfigError
from nbqlora.core.names import REFUSED_PEFT, REFUSED_TRL
from nbqlora.core.request import CellRequest

FIELDS = {
    "trl": frozenset(["learning_rate", "logging_steps", "save_steps", "adam_beta1", "neftune_noise_alpha"]),
    "peft": frozenset(["r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern"]),
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
    def never(table: str) -> frozenset[str]:
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

    assert set(REFUSED_TRL) <= table_fields("trl")
    assert set(REFUSED_PEFT) <= table_fields("peft")


def test_no_refused_key_is_an_option_of_its_own() -> None:
    from dataclasses import fields

    assert not {f.name for f in fields(FinetuneConfig)} & {*REFUSED_TRL, *REFUSED_PEFT}
