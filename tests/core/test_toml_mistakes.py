"""TOML that is wrong: each mistake has its line and what to write instead, and hides no other."""

from typing import Any

import pytest

from nbqlora.core.checks import of_type
from nbqlora.core.config import validate
from nbqlora.core.errors import ConfigError
from nbqlora.core.request import parse_toml

HEAD = 'model = "demo"\ndata = "demo"\n'
PYTHON = "is Python, which is not run here"
EVALUATED = 'write the value itself, or "$name" for an object of the notebook'
BACKSLASH = 'in "...", a backslash begins a special character'
# text of line 4: (key, message, hint)
ONE_LINE = {
    "learning_rate = 2.e-4": ("learning_rate", "a number has a digit behind its point", "write learning_rate = 2.0e-4"),
    "num_train_epochs = 3 epochs": ("num_train_epochs", "a number has no unit", "write the number alone"),
    'eval_data = "a.jsonl" // mine': (
        "eval_data", "something stands behind the text", "put it into the quotes; a comment begins with #",
    ),
    'eval_data = [{"text": "a"}]': (
        "eval_data", "a list of dicts is Python", 'name it in a cell above, and write eval_data = "$name"',
    ),
    "// mine": ("// mine", "is no comment here", "a comment begins with #"),
    "output_dir = runs/one": ("output_dir", "text needs quotes", 'write output_dir = "runs/one"'),
    "output_dir = my runs": ("output_dir", "text needs quotes", 'write output_dir = "my runs"'),
    "eval_data = data/*.jsonl": ("eval_data", "text needs quotes", 'write eval_data = "data/*.jsonl"'),
    "eval_data = 8b-rows": ("eval_data", "text needs quotes", 'write eval_data = "8b-rows"'),
    "dtype = bf16 # fast": ("dtype", "text needs quotes", 'write dtype = "bf16"'),
    "eval_data = $rows": ("eval_data", "text needs quotes", 'write eval_data = "$rows"'),
    "eval_data = rows": ("eval_data", "text needs quotes", 'write eval_data = "$rows" for the object of this notebook'),
    "target_modules = q_proj, v_proj": ("target_modules", "text needs quotes",
                                        'write target_modules = ["q_proj", "v_proj"]'),
    'target_modules = ["q_proj", v_proj]': ("target_modules", "text needs quotes", 'write "v_proj" instead of v_proj'),
    "packing = True": ("packing", "TOML has only true and false", "write true instead of True"),
    "packing = off": ("packing", "TOML has only true and false", "write false instead of off"),
    "max_minutes = None": ("max_minutes", "TOML has no None", "leave the line out"),
    "max_minutes = null": ("max_minutes", "TOML has no null", "leave the line out"),
    'report_to = ["wandb", None]': ("report_to", "TOML has no None", "leave it out"),
    "seed =": ("seed", "has no value", "write seed = value, or leave the line out"),
    "seed = # none yet": ("seed", "has no value", "write seed = value, or leave the line out"),
    'output_dir = "runs': ("output_dir", "the quote is never closed", 'end the text with "'),
    "output_dir = 'runs": ("output_dir", "the quote is never closed", "end the text with '"),
    "output_dir = 'runs\"": ("output_dir", "the quote is never closed", "end the text with '"),
    "output_dir = “runs”": ("output_dir", "has curly quotes", "use straight ones, \" or '"),
    'output_dir = f"runs"': ("output_dir", PYTHON, "leave out the letter before the quote"),
    r'output_dir = "C:\Users\me"': ("output_dir", BACKSLASH, r"write output_dir = 'C:\Users\me'"),
    r'output_dir = "C:\data"': ("output_dir", BACKSLASH, r"write output_dir = 'C:\data'"),
    "seed = 3,": ("seed", "ends with a comma", "write seed = 3"),
    'output_dir = "a",': ("output_dir", "ends with a comma", 'write output_dir = "a"'),
    "learning_rate = .5": ("learning_rate", "a number starts with a digit", "write learning_rate = 0.5"),
    "weight_decay = 5.": ("weight_decay", "a number ends with a digit", "write weight_decay = 5.0"),
    "seed = 007": ("seed", "a number does not start with 0", "write seed = 7"),
    "max_length = 1,024": ("max_length", "a number has no commas", "write max_length = 1024"),
    "vram_gib = 16GB": ("vram_gib", "a number has no unit", "write the number alone"),
    "max_minutes = 30 min": ("max_minutes", "a number has no unit", "write the number alone"),
    "max_length = 2**10": ("max_length", PYTHON, EVALUATED),
    "max_length = len(rows)": ("max_length", PYTHON, EVALUATED),
    "eval_data = rows[:10]": ("eval_data", PYTHON, EVALUATED),
    "learning_rate = 1e-4 * 2": ("learning_rate", PYTHON, EVALUATED),
    'gradient_checkpointing = {"keep": 3}': ("gradient_checkpointing", "a table reads {name = value}",
                                             "write gradient_checkpointing = {keep = 3}"),
    "seed = 1 max_steps = 3": ("seed", "one key a line", "begin a new line before max_steps"),
    "seed == 3": ("seed", "expected one = between key and value, got ==", "write seed = 3"),
    "seed: 3": ("seed", "expected one = between key and value, got :", "write seed = 3"),
    "output_dir: runs/a": ("output_dir", "expected one = between key and value, got :", 'write output_dir = "runs/a"'),
    "'packing': True,": ("packing", "expected one = between key and value, got :", "write packing = true"),
    "seed": ("seed", "expected key = value", 'for example model = "demo"'),
    "import os": ("import os", "expected key = value", 'for example model = "demo"'),
    "lora_r += 1": ("lora_r += 1", "expected key = value", 'for example model = "demo"'),
    "= 3": ("= 3", "expected key = value", 'for example model = "demo"'),
    "!pip install x": ("!pip install x", "is no option", "commands go into a cell of their own"),
    "%vram": ("%vram", "is no option", "commands go into a cell of their own"),
    "seed\u00a0= 3": ("seed", "holds an invisible character, U+00A0", "type the line again"),
    "seed = 3\u200b": ("seed", "holds an invisible character, U+200B", "type the line again"),
    "seed = 3\x00": ("seed", "holds an invisible character, U+0000", "type the line again"),
    "\u200bé = 3": ("é = 3", "holds an invisible character, U+200B", "type the line again"),
    "é = 3": ("é = 3", "expected key = value", 'for example model = "demo"'),
    "[trl": ("[trl", "is no table's header", "write [trl] or [peft] alone on a line"),
    "[]": ("[]", "is no table's header", "write [trl] or [peft] alone on a line"),
    "[trl] x": ("[trl] x", "is no table's header", "write [trl] or [peft] alone on a line"),
    "seed = - 3": ("seed", "not TOML: Invalid value", ""),
    "model = 'other'": ("model", "is given twice", "first on line 2; keep one"),
    "model.x = 1": ("model", "is given twice", "first on line 2; keep one"),
}  # fmt: skip
# Longer mistakes: text from line 4 on, and the line that is named.
LONGER = {
    'target_modules = ["q_proj"': (4, "target_modules", "the list is never closed", "add ] at its end"),
    'target_modules = [\n"q_proj",': (4, "target_modules", "the list is never closed", "add ] at its end"),
    "gradient_checkpointing = {keep = 3": (4, "gradient_checkpointing", "the table is never closed",
                                           "add } at its end"),
    'output_dir = """a\nb': (4, "output_dir", "the text is never closed", 'add """ at its end'),
    "output_dir = '''a": (4, "output_dir", "the text is never closed", "add ''' at its end"),
    'target_modules = [\n  "q_proj", # a = [\n  v_proj,\n]': (6, "target_modules", "text needs quotes",
                                                           'write "v_proj" instead of v_proj'),
    "gradient_checkpointing = {keep = 3,\n  recompute = 2}": (
        4, "gradient_checkpointing", "a table in braces stands on one line",
        "write gradient_checkpointing = {keep = 3, recompute = 2}"),
    "[peft]\nuse_dora = true\n[peft]\nbias = 'none'": (6, "[peft]", "is given twice", "first on line 4; keep one"),
    "peft.use_dora = true\n[peft]\nbias = 'none'": (5, "[peft]", "is given twice", "first on line 4; keep one"),
    "[peft]\nuse_dora = true\n# more\nuse_dora = false": (7, "peft.use_dora", "is given twice",
                                                         "first on line 5; keep one"),
    "x = " + "[" * 5000: (4, "x", "the list is never closed", "add ] at its end"),
}  # fmt: skip


def found_in(text: str) -> list[tuple[int | None, str, str, str]]:
    fields = {
        "trl": dict.fromkeys(["run_name"], of_type(Any)),
        "peft": dict.fromkeys(["use_dora", "bias"], of_type(Any)),
    }
    with pytest.raises(ConfigError) as caught:
        request = parse_toml(text, first_line=2, source="this cell", namespace={"rows": [1]})
        validate(request, table_fields=fields.__getitem__)
    return [(p.line, p.key, p.message, p.hint) for p in caught.value.problems]


@pytest.mark.parametrize("line", ONE_LINE)
def test_a_mistake_on_one_line(line: str) -> None:
    assert found_in(f"{HEAD}{line}\n") == [(4, *ONE_LINE[line])]


@pytest.mark.parametrize("line", ONE_LINE)
def test_it_hides_neither_what_stands_above_nor_below(line: str) -> None:
    # A table's header takes the keys below it, so what follows stands in a table of its own.
    found = found_in(f"{HEAD}{line}\n[trl]\nrun_nam = 1\n".replace('data = "demo"', 'dtaa = "demo"'))
    problems = [(3, "dtaa", "unknown key", "did you mean data?"), (4, *ONE_LINE[line]),
                (6, "trl.run_nam", "unknown key", "did you mean trl.run_name?")]  # fmt: skip
    assert found == problems


@pytest.mark.parametrize("text", LONGER, ids=lambda t: t[:40])
def test_a_mistake_over_several_lines(text: str) -> None:
    assert found_in(HEAD + text) == [LONGER[text]]


@pytest.mark.parametrize(
    "text", ['target_modules = ["q_proj"', 'target_modules = [\n"q",', 'output_dir = """a', "peft = {use_dora = true"]
)
def test_what_is_never_closed_hides_nothing_below(text: str) -> None:
    n_lines = 1 + text.count("\n")
    found = found_in(f"{HEAD}{text}\nlora_r = 0\n[trl]\nrun_nam = 1\n")
    assert [(line, key) for line, key, _, _ in found] == [
        (4, text.split(" ")[0]), (4 + n_lines, "lora_r"), (6 + n_lines, "trl.run_nam"),
    ]  # fmt: skip


def test_keys_below_a_broken_header_do_not_fall_into_the_table_above() -> None:
    assert found_in(f"{HEAD}[trl]\nrun_name = 'a'\n[peft\nuse_dora = true\n") == [
        (6, "[peft", "is no table's header", "write [trl] or [peft] alone on a line")
    ]


def test_several_mistakes_come_at_once_in_order() -> None:
    text = 'model = demo\ndata = "demo\nseed = None\nseed = 3\nlora_alpha = 0\npacking: yes\nseed = 2\n'
    assert [(line, key) for line, key, _, _ in found_in(text)] == [
        (2, "model"), (3, "data"), (4, "seed"), (6, "lora_alpha"), (7, "packing"), (8, "seed"),
    ]  # fmt: skip


def test_yaml_is_one_problem_a_line_and_nothing_is_missing() -> None:
    assert [(line, key, hint) for line, key, _, hint in found_in("model: demo\ndata: demo\n")] == [
        (2, "model", 'write model = "demo"'), (3, "data", 'write data = "demo"'),
    ]  # fmt: skip


def test_prose_is_cut_short() -> None:
    found = found_in(HEAD + "this is prose\n" * 200)
    assert len(found) == 11
    assert found[-1] == (14, "...", "190 more lines are no TOML", "")


def test_numbers_beyond_what_python_reads() -> None:
    ((line, key, message, _),) = found_in(f"{HEAD}max_length = 1{'0' * 5000}\n")
    assert (line, key) == (4, "max_length")
    assert message.startswith("not TOML: Exceeds the limit (4300 digits)")


@pytest.mark.parametrize("cut", range(0, 200, 3))
def test_text_cut_anywhere_is_never_another_exception(cut: int) -> None:
    text = HEAD + (
        "trl = {run_name = \"a\\tb\", optim_args = 'x'} # c\n[peft.rank_pattern]\n"
        '"a.b" = [1, [2, """x\ny"""], {z = 1}]\n'
        "d = 1979-05-27T07:32:00Z\n[[trl.x]]\né = “x”\n"
    )
    for broken in (text[:cut], text[cut:], text[:cut] + "\n" + text[cut:], text[:cut] + "]}'" + text[cut:]):
        try:
            parse_toml(broken, first_line=2, source="this cell", namespace={})
        except ConfigError as error:
            assert "it is empty" in str(error) or "Python dict" in str(error)
