"""TOML that is right: values, lines, ``$name`` objects; and TOML that says nothing."""

from typing import Any

import pytest

from nbqlora.core.checks import of_type
from nbqlora.core.config import FinetuneConfig, validate
from nbqlora.core.errors import ConfigError
from nbqlora.core.request import CellRequest, parse_toml

FIELDS = {
    "trl": dict.fromkeys(["adam_beta1", "run_name", "optim_args"], of_type(Any)),
    "peft": dict.fromkeys(["use_dora", "rank_pattern"], of_type(Any)),
}
HEAD = 'model = "demo"\ndata = "demo"\n'


def cell(text: str, namespace: dict[str, Any] | None = None) -> CellRequest:
    return parse_toml(text, first_line=2, source="this cell", namespace={} if namespace is None else namespace)


def config_of(text: str, namespace: dict[str, Any] | None = None) -> FinetuneConfig:
    return validate(cell(text, namespace), table_fields=FIELDS.__getitem__)


def message_of(text: str, namespace: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        config_of(text, namespace)
    return str(caught.value)


def test_values_are_typed() -> None:
    config = config_of(HEAD + "max_length = 2_048\nlearning_rate = 2e-4\npacking = true\ntarget_modules = ['q', 'v']\n")
    assert (config.max_length, config.learning_rate, config.packing) == (2048, 2e-4, True)
    assert config.target_modules == ("q", "v")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_system(end: str) -> None:
    request = cell((HEAD + "# a comment\n\nseed = 3\n").replace("\n", end))
    assert request.options == {"model": "demo", "data": "demo", "seed": 3}
    assert request.line_of == {"model": 2, "data": 3, "seed": 6}


def test_lines_are_those_of_the_editor() -> None:
    text = """\
# the first line is a comment = 3
\tmodel = "demo"  # tabs may lead

data = '''
lora_r = 1
'''
'seed' = 3
output_dir = "a # b = c"
target_modules = [  # seed = 4
  "q_proj",  # packing = true
  "v_proj",
]
peft.use_dora = true
trl = {run_name = "x", optim_args = "y"}
[ gradient_checkpointing ]  # comment
keep = 3
"""
    request = cell(text)
    assert not request.problems
    assert request.line_of == {
        "model": 3, "data": 5, "seed": 8, "output_dir": 9, "target_modules": 10, "peft": 14, "peft.use_dora": 14,
        "trl": 15, "trl.run_name": 15, "trl.optim_args": 15, "gradient_checkpointing": 16,
        "gradient_checkpointing.keep": 17,
    }  # fmt: skip


def test_nested_tables_and_dotted_keys() -> None:
    request = cell(HEAD + "[peft]\nuse_dora = true\n[peft.rank_pattern]\n'model.layers.0' = 4\n")
    assert request.options["peft"] == {"use_dora": True, "rank_pattern": {"model.layers.0": 4}}
    assert request.line_of["peft.rank_pattern"] == 6
    assert request.line_of["peft.rank_pattern.model.layers.0"] == 7


def test_unicode_and_line_separators_inside_text() -> None:
    request = cell('model = "模型/é"\noutput_dir = "a\u2028b\u0085c"\ndata = "🎉"\nseed = 1\n')
    assert request.options["output_dir"] == "a\u2028b\u0085c"
    assert request.options["model"] == "模型/é"
    assert request.line_of["seed"] == 5


def test_a_byte_order_mark_is_passed_over() -> None:
    assert cell("\ufeff" + HEAD).options == {"model": "demo", "data": "demo"}


def test_text_over_several_lines_is_not_looked_into() -> None:
    request = cell(HEAD + 'output_dir = """\nseed = 1\n\\""" [trl]\n"""\nlora_r = 4\n')
    assert request.line_of["lora_r"] == 8
    assert "seed" not in request.line_of


@pytest.mark.parametrize("text", ["", "\n", "# only\n  # comments\n", "\t\r\n"])
def test_nothing_at_all(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cell(text)
    assert str(caught.value) == ('1 problem in this cell\n  it is empty; start with model = "demo" and data = "demo"')


@pytest.mark.parametrize("body", ['{"model": "demo",\n "data": 3}', "\n {'model': 'demo'}", '{\n"model": "demo"\n}'])
def test_a_python_dict_is_one_problem(body: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cell(body)
    (problem,) = caught.value.problems
    assert problem.line == 2 + body[: body.index("{")].count("\n")
    assert problem.message == "a Python dict or JSON is no TOML"
    assert problem.hint == 'write one key = value a line, without braces and commas: model = "demo"'


def test_objects_of_the_notebook() -> None:
    rows, name = [{"prompt": "a", "completion": "b"}], "run name"
    text = 'model = "demo"\ndata = "$rows"\nmax_length = "$n"\ntarget_modules = ["$q", "v_proj"]\n'
    config = config_of(f'{text}[trl]\nrun_name = "$name"\n', {"rows": rows, "n": 64, "q": "q_proj", "name": name})
    assert config.data is rows
    assert (config.max_length, config.target_modules) == (64, ("q_proj", "v_proj"))
    assert config.trl == {"run_name": name}


def test_an_object_that_is_wrong_is_one_problem_of_its_line() -> None:
    message = message_of('model = "demo"\ndata = "$n"\n', {"n": 3})
    assert message == "1 problem in this cell\n  line 3  data  expected a file, a data set's name or rows, got 3"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("$row", "this notebook has no object row; did you mean $rows?"),
        ("$zzz", "this notebook has no object zzz; run the cell that makes zzz first"),
        ("$HOME/x.jsonl", "expected $ and the name of an object, got $HOME/x.jsonl; "
                          "give the object a name in a cell above; environment variables are not read"),
        ("$", "expected $ and the name of an object, got $; "
              "give the object a name in a cell above; environment variables are not read"),
    ],
)  # fmt: skip
def test_objects_that_are_not_there(value: str, said: str) -> None:
    message = message_of(f'model = "demo"\ndata = "{value}"\n', {"rows": [1], "_hidden": 1})
    assert message == f"1 problem in this cell\n  line 3  data  {said}"


def test_an_object_that_is_not_there_is_not_also_a_wrong_value() -> None:
    assert message_of(HEAD + 'lora_r = "$rank"\n') == (
        "1 problem in this cell\n  line 4  lora_r  this notebook has no object rank; run the cell that makes rank first"
    )


def test_a_file_has_no_objects() -> None:
    request = parse_toml('model = "demo"\ndata = "$rows"\n', source="a.toml")
    (problem,) = request.problems
    assert (problem.line, problem.key) == (2, "data")
    assert problem.message == "$rows names an object of a notebook, and there is none here"
    assert problem.hint == "give a file instead"


def test_lines_of_what_validation_finds() -> None:
    text = 'model = "demo"\nlora_rank = 8\ntrl = {run_nam = 1}\npeft.use_dorra = true\ngradient_checkpointing.kep = 2\n'
    assert message_of(text) == (
        "5 problems in this cell\n"
        '          data                    is missing; for a first try write "demo"\n'
        "  line 3  lora_rank               unknown key; did you mean lora_r?\n"
        "  line 4  trl.run_nam             unknown key; did you mean trl.run_name?\n"
        "  line 5  peft.use_dorra          unknown key; did you mean peft.use_dora?\n"
        "  line 6  gradient_checkpointing  expected layers by policy (keep, recompute_mlp, recompute, offload, join), "
        "got kep"
    )


def test_an_option_below_a_table_is_not_also_missing() -> None:
    assert message_of('[trl]\nmodel = "demo"\ndata = "demo"\n') == (
        "2 problems in this cell\n"
        "  line 3  trl.model  is an option of its own; write model at the top level, above any [table]\n"
        "  line 4  trl.data   is an option of its own; write data at the top level, above any [table]"
    )


def test_repr_names_the_options_not_the_objects() -> None:
    request = cell('model = "demo"\ndata = "$rows"\n', {"rows": ["secret"] * 1000})
    assert repr(request) == "CellRequest(this cell: model, data)"
