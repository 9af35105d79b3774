"""``import nbqlora`` and ``%load_ext nbqlora`` take milliseconds and bring nothing heavy."""

import subprocess
import sys

import pytest

import nbqlora

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "numpy", "pandas", "matplotlib",
         "ipywidgets", "triton", "accelerate", "safetensors", "gguf", "pynvml")  # fmt: skip
EXTENSION = """
class Shell:
    input_transformers_cleanup = []
    def register_magics(self, *magics):
        self.magics = magics
shell = Shell()
nbqlora.load_ipython_extension(shell)
assert [m.__name__ for m in shell.magics] == ["NbqloraMagics", "VramMagics"]
"""


def imported_by(code: str) -> set[str]:
    program = f"import sys\nimport nbqlora\n{code}\nprint(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    ["", EXTENSION, "nbqlora.ConfigError, nbqlora.NbqloraError, nbqlora.Plan, nbqlora.Report, nbqlora.VramReport"],
    ids=["import", "extension", "values"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert not imported_by(code) & {*HEAVY}


def test_only_the_extension_needs_ipython() -> None:
    assert "IPython" not in imported_by("")


def test_core_needs_the_standard_library_only() -> None:
    core = "import importlib, pkgutil, nbqlora.core as c\n"
    core += "[importlib.import_module(f'nbqlora.core.{m.name}') for m in pkgutil.iter_modules(c.__path__)]"
    added = imported_by(core) - imported_by("").union(sys.stdlib_module_names)
    assert added == set()


def test_importing_changes_nothing_outside() -> None:
    code = """
import os, signal, threading, warnings
before = dict(os.environ), signal.getsignal(signal.SIGINT), list(warnings.filters), threading.active_count()
import nbqlora.core.config, nbqlora.notebook.magics
after = dict(os.environ), signal.getsignal(signal.SIGINT), list(warnings.filters), threading.active_count()
assert before[0] == after[0] and before[1] is after[1] and before[3] == after[3]
"""
    imported_by(code)


def test_dir_lists_the_public_names() -> None:
    assert set(nbqlora.__all__) <= set(dir(nbqlora))
    assert {"__version__", "load_ipython_extension"} <= set(dir(nbqlora))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'nbqlora' has no attribute 'finetun'"):
        nbqlora.finetun  # noqa: B018
    assert not hasattr(nbqlora, "__path_to_nothing__")


def test_each_light_public_name_is_what_it_says() -> None:
    from nbqlora.core.errors import ConfigError, NbqloraError

    assert nbqlora.ConfigError is ConfigError
    assert nbqlora.NbqloraError is NbqloraError
    assert issubclass(nbqlora.ConfigError, nbqlora.NbqloraError)
    assert nbqlora.__version__.count(".") == 2
