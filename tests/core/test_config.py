"""Every option: a good value, a bad one, and what is said about the bad one."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from nbqlora.core.checks import of_type
from nbqlora.core.config import FinetuneConfig, validate
from nbqlora.core.errors import ConfigError
from nbqlora.core.request import CellRequest

ROWS = "expected a file, a data set's name or rows, got"
TABLE = 'expected "auto", "none", "full", "offload" or a table {keep = 22, recompute = 10}, got'
SCHEDULES = "linear, cosine, constant, constant_with_warmup, polynomial, inverse_sqrt"
UNBOUNDED = "paged optimizers keep their states in managed memory, which no plan can bound; use adamw_8bit"
SPLIT = "true splits the NF4 weights of each layer over the cards, and nothing else"
# option: (good values, ((bad value, what is said), ...))
UNQUOTE = "; leave out the quotes"
LEAVES: dict[str, tuple[list[Any], list[tuple[Any, str]]]] = {
    "model": (
        ["demo", "owner/name", "./folder"],
        [("", 'expected text, got ""'), (3, "expected text, got 3"), (None, "expected text, got None")],
    ),
    "data": (
        ["demo", "rows.jsonl", [{"messages": []}], (), Path("rows.jsonl")],
        [(None, f"{ROWS} None"), (3, f"{ROWS} 3"), (True, f"{ROWS} true"), (b"x", f"{ROWS} b'x'")],
    ),
    "eval_data": (["demo", None, []], [(False, f"{ROWS} false"), (" ", 'expected text, got " "')]),
    "output_dir": (["runs/a", None], [(4, "expected text, got 4"), ([], "expected text, got []")]),
    "dtype": (
        ["auto", "bf16", "fp16", "fp32"],
        [("bfloat16", 'expected one of auto, bf16, fp16, fp32, got "bfloat16"; did you mean bf16?')],
    ),
    "load_in_4bit": (
        [True, False],
        [("true", 'expected true or false, got "true"' + UNQUOTE), (1, "expected true or false, got 1")],
    ),
    "trust_remote_code": ([True, False], [("yes", 'expected true or false, got "yes"')]),
    "vram_gib": (
        [None, 6, 13.5],
        [
            (0, "expected a number above 0, got 0"),
            ("13 GiB", 'expected a number above 0, got "13 GiB"'),
            (float("inf"), "expected a number above 0, got inf"),
            (float("nan"), "expected a number above 0, got nan"),
            (-(10**400), "expected a number above 0, got a huge number"),
        ],
    ),
    "ram_gib": ([None, 0, 6, 9.5], [(-1, "expected a number of at least 0, got -1"),
                                    ("all", 'expected a number of at least 0, got "all"')]),
    "gpus": (
        [None, 1, 2, 8, "all"],
        [(0, 'expected a whole number of at least 1 or "all", got 0'),
         (True, 'expected a whole number of at least 1 or "all", got true'),
         ("both", 'expected a whole number of at least 1 or "all", got "both"')],
    ),
    "fsdp": (
        ["auto", True, False],
        [
            ("yes", 'expected "auto", true or false, got "yes"'),
            (1, 'expected "auto", true or false, got 1'),
            ("full_shard auto_wrap", f'expected "auto", true or false, got "full_shard auto_wrap"; {SPLIT}'),
            (["full_shard"], f"expected \"auto\", true or false, got ['full_shard']; {SPLIT}"),
            ("no_shard", 'expected "auto", true or false, got "no_shard"; false keeps the whole model on each card'),
            ([], 'expected "auto", true or false, got []'),
        ],
    ),
    "max_minutes": ([None, 0.5, 90], [(-1, "expected a number above 0, got -1")]),
    "effective_batch_size": (
        [None, 1, 16],
        [(0, "expected a whole number of at least 1, got 0"),
         (True, "expected a whole number of at least 1, got true")],
    ),
    "per_device_train_batch_size": ([None, 4], [(2.0, "expected a whole number of at least 1, got 2.0")]),
    "gradient_accumulation_steps": ([None, 4], [("4", 'expected a whole number of at least 1, got "4"' + UNQUOTE)]),
    "gradient_checkpointing": (
        ["auto", "none", "full", "offload", True, False, {"keep": 3}, {"keep": 22, "recompute_mlp": 6, "recompute": 4},
         {"offload": 8, "join": 24}],
        [
            ("some", f'{TABLE} "some"'),
            ({}, f"{TABLE} {{}}"),
            (None, f"{TABLE} None"),
            ({"keep": 3, "drop": 2},
             "expected layers by policy (keep, recompute_mlp, recompute, offload, join), got drop"),
            ({"keep": -1}, "expected a whole number of at least 0, got -1"),
        ],
    ),
    "max_length": ([8, 4096], [(7, "expected a whole number of at least 8, got 7")]),
    "packing": ([True, False, "auto"], [("bfd", 'expected "auto", true or false, got "bfd"')]),
    "padding_free": ([None, True, False], [("yes", 'expected true or false, got "yes"')]),
    "chat_template_path": ([None, "plain"], [("", 'expected text, got ""')]),
    "save_minutes": ([0, 0.5, 60], [(-1, "expected a number of at least 0, got -1")]),
    "assistant_only_loss": ([True, False], [(None, "expected true or false, got None")]),
    "num_train_epochs": ([1, 0.5, 3], [(0, "expected a number above 0, got 0")]),
    "max_steps": (
        [-1, 1, 500],
        [(0, "expected a whole number of at least 1, or -1 for whole epochs, got 0"),
         (-2, "expected a whole number of at least 1, or -1 for whole epochs, got -2")],
    ),
    "learning_rate": (
        [2e-4, 0.5],
        [
            (2, "expected a number above 0 and below 1, got 2"),
            ("2e-4", 'expected a number above 0 and below 1, got "2e-4"' + UNQUOTE),
            (10**400, "expected a number above 0 and below 1, got a huge number"),
        ],
    ),
    "lr_scheduler_type": (
        ["linear", "cosine"],
        [("linaer", f'expected one of {SCHEDULES}, got "linaer"; did you mean linear?')],
    ),
    "warmup_ratio": ([0, 0.03], [(1, "expected a number of at least 0 and below 1, got 1")]),
    "weight_decay": ([0, 0.1], [(-0.1, "expected a number of at least 0, got -0.1")]),
    "max_grad_norm": ([0, 1.0], [(True, "expected a number of at least 0, got true")]),
    "optim": (
        ["adamw_torch_fused", "adamw_torch", "adamw_8bit"],
        [("paged_adamw_8bit", UNBOUNDED),
         ("sgd", 'expected one of adamw_torch_fused, adamw_torch, adamw_8bit, got "sgd"')],
    ),
    "lora_r": ([1, 64], [(0, "expected a whole number of at least 1, got 0")]),
    "lora_alpha": ([16, 0.5], [(0, "expected a number above 0, got 0")]),
    "lora_dropout": ([0, 0.1], [(1.0, "expected a number of at least 0 and below 1, got 1.0")]),
    "target_modules": (
        ["all-linear", "q_proj", ["q_proj", "v_proj"], ("q_proj",)],
        [([], "expected a name or a list of names, got []"),
         (["q", 3], "expected a name or a list of names, got ['q', 3]")],
    ),
    "seed": (
        [0, 2**32 - 1],
        [(-1, "expected a whole number of at least 0 and at most 4294967295, got -1"),
         (2**32, "expected a whole number of at least 0 and at most 4294967295, got 4294967296"),
         (1 << 30_000, "expected a whole number of at least 0 and at most 4294967295, got a huge number")],
    ),
    "report_to": (
        ["none", "wandb", ["wandb", "tensorboard"]],
        [(None, "expected a name or a list of names, got None")],
    ),
    "trl": ([{}, {"adam_beta1": 0.8}], [("x", 'expected a table, got "x"'), ([1], "expected a table, got [1]")]),
    "peft": ([{}, {"use_dora": True}], [(1, "expected a table, got 1")]),
}  # fmt: skip
GOOD = [(name, value) for name, (good, _) in LEAVES.items() for value in good]
BAD = [(name, value, message) for name, (_, bad) in LEAVES.items() for value, message in bad]


def make(**options: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"model": "demo", "data": "demo", **options})


def problems_of(error: ConfigError) -> list[tuple[str, str, str]]:
    return [(p.key, p.message, p.hint) for p in error.problems]


def check(**options: Any) -> list[tuple[str, str, str]]:
    fields_of = {
        "trl": dict.fromkeys(["logging_steps", "adam_beta1"], of_type(Any)),
        "peft": dict.fromkeys(["use_dora", "r"], of_type(Any)),
    }
    with pytest.raises(ConfigError) as caught:
        validate(CellRequest(options=options), table_fields=fields_of.__getitem__)
    return problems_of(caught.value)


def test_every_option_is_tested_here_and_there_are_few() -> None:
    assert set(LEAVES) == {f.name for f in fields(FinetuneConfig)}
    # Beside the two tables; a new one needs a reason why no plan can decide it.
    assert len(set(LEAVES) - {"trl", "peft"}) <= 36


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_good_values_stay_as_they_are(name: str, value: Any) -> None:
    assert getattr(make(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=lambda v: type(v).__name__)
def test_bad_values_are_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**{name: value})
    assert problems_of(caught.value) == [(name, message, "")]


def test_long_values_are_named_by_their_type() -> None:
    message = "expected a whole number of at least 1, got"
    assert check(model="m", data="d", lora_r=list(range(100))) == [("lora_r", f"{message} a list", "")]
    assert check(model="m", data="d", lora_r=frozenset(range(100))) == [("lora_r", f"{message} a frozenset", "")]
    assert check(model="m", data="d", lora_r="4" * 100) == [("lora_r", f"{message} long text", "")]


def test_values_that_compare_by_element_are_named_too() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(3)
    assert [p[0] for p in check(model="m", data="d", dtype=array, gradient_checkpointing=array)] == [
        "dtype",
        "gradient_checkpointing",
    ]


def test_all_problems_come_at_once() -> None:
    found = check(dtype="int8", lora_rank=8, max_length=1, trl={"save_steps": 5}, effective_batch_size=16,
                  per_device_train_batch_size=5)  # fmt: skip
    assert {key for key, _, _ in found} == {
        "model", "data", "dtype", "lora_rank", "max_length", "trl.save_steps", "per_device_train_batch_size",
    }  # fmt: skip
    assert len(found) == 7


def test_what_is_required_is_asked_for() -> None:
    hint = 'for a first try write "demo"'
    assert check(seed=1) == [("model", "is missing", hint), ("data", "is missing", hint)]


def test_defaults_are_the_documented_ones() -> None:
    config = make()
    assert (config.max_length, config.lora_r, config.packing, config.optim) == (1024, 16, "auto", "adamw_torch_fused")
    assert config.effective_batch_size is None
    assert config.trl == {} == config.peft


BATCH = ("effective_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")


@pytest.mark.parametrize(
    "triple", [(16, 4, 4), (16, 4, None), (16, None, 16), (None, 3, 5), (None, 3, None), (7, 7, 1)]
)
def test_consistent_batches(triple: tuple[Any, ...]) -> None:
    make(**dict(zip(BATCH, triple, strict=True)))


@pytest.mark.parametrize(
    ("triple", "problem"),
    [
        ((16, 3, 5), ("effective_batch_size", "3 rows x 5 accumulation steps = 15, but effective_batch_size is 16",
                      "leave one of the three out")),
        ((16, 3, None), ("per_device_train_batch_size", "3 does not divide 16", "effective_batch_size is 16")),
        ((16, None, 5), ("gradient_accumulation_steps", "5 does not divide 16", "effective_batch_size is 16")),
        ((4, 8, None), ("per_device_train_batch_size", "8 does not divide 4", "effective_batch_size is 4")),
    ],
)  # fmt: skip
def test_inconsistent_batches(triple: tuple[Any, ...], problem: tuple[str, str, str]) -> None:
    assert check(model="m", data="d", **dict(zip(BATCH, triple, strict=True))) == [problem]


def test_a_batch_is_that_of_all_cards() -> None:
    pinned = dict(zip(BATCH, (16, 4, 2), strict=True))
    make(**pinned, gpus=2)
    make(**pinned, gpus="all")  # the planner's to check, which knows how many
    many = "3 cards x 4 rows x 2 accumulation steps = 24, but effective_batch_size is 16"
    found = ("effective_batch_size", many, "leave one of the three out")
    assert check(model="m", data="d", **pinned, gpus=3) == [found]


def test_as_dict_is_json_and_describes_rows() -> None:
    class Frame:
        def __len__(self) -> int:
            return 7

    config = make(
        data=[{"messages": [{"role": "user", "content": "secret"}]}] * 3,
        eval_data=Frame(),
        target_modules=("q_proj", "v_proj"),
        gradient_checkpointing={"keep": 2},
        trl={"betas": [0.9, 0.95], "nested": {"x": (1, float("inf"))}, "object": object(), "path": Path("a/b")},
    )
    plain = config.as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["data"] == "<list of 3 rows>"
    assert plain["eval_data"] == "<Frame of 7 rows>"
    assert plain["target_modules"] == ["q_proj", "v_proj"]
    assert plain["trl"] == {"betas": [0.9, 0.95], "nested": {"x": [1, None]}, "object": "<object>", "path": "a/b"}
    assert set(plain) == set(LEAVES)
    assert make(data=Path("rows.jsonl")).as_dict()["data"] == "rows.jsonl"


def test_repr_is_short_and_holds_no_rows() -> None:
    config = make(data=[{"messages": "secret"}] * 1000, lora_r=8, trl={"adam_beta1": 0.8})
    assert repr(config) == (
        "FinetuneConfig(model='demo', data='<list of 1000 rows>', lora_r=8, trl={'adam_beta1': 0.8})"
    )
    assert repr(make()) == "FinetuneConfig(model='demo', data='demo')"
