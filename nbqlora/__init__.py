"""nbqlora: fine-tune language models with QLoRA from a notebook cell, on the memory you really have.

The public names are resolved on first use, so that ``import nbqlora`` and ``%load_ext nbqlora`` take
milliseconds and import neither torch nor widgets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbqlora.core.version import __version__ as __version__

__all__ = [
    "ConfigError", "DataReport", "DoctorReport", "MemoryTable", "NbqloraError", "Plan", "Report", "Run",
    "VramReport", "compare_widget", "data_report", "doctor", "export_gguf", "finetune", "load", "memory_table",
    "merge", "optimize", "plan", "planner_widget", "restore", "teach", "timeline", "vram",
]  # fmt: skip

_HOME = {
    "ConfigError": "nbqlora.core.errors",
    "DataReport": "nbqlora.core.data_report",
    "DoctorReport": "nbqlora.core.doctor",
    "MemoryTable": "nbqlora.core.memory_table",
    "NbqloraError": "nbqlora.core.errors",
    "Plan": "nbqlora.core.plan",
    "Report": "nbqlora.core.report",
    "Run": "nbqlora.run",
    "VramReport": "nbqlora.core.report",
    "compare_widget": "nbqlora.notebook.compare_widget",
    "data_report": "nbqlora.api",
    "doctor": "nbqlora.api",
    "export_gguf": "nbqlora.api",
    "finetune": "nbqlora.api",
    "load": "nbqlora.own_loop",
    "memory_table": "nbqlora.api",
    "merge": "nbqlora.api",
    "optimize": "nbqlora.own_loop",
    "plan": "nbqlora.api",
    "planner_widget": "nbqlora.notebook.planner_widget",
    "restore": "nbqlora.own_loop",
    "timeline": "nbqlora.notebook.timeline",
    "vram": "nbqlora.api",
}
_MODULES = {"teach": "nbqlora.notebook.teach"}

if TYPE_CHECKING:
    from nbqlora.api import (
        data_report,
        doctor,
        export_gguf,
        finetune,
        memory_table,
        merge,
        plan,
        vram,
    )
    from nbqlora.core.data_report import DataReport
    from nbqlora.core.doctor import DoctorReport
    from nbqlora.core.errors import ConfigError, NbqloraError
    from nbqlora.core.memory_table import MemoryTable
    from nbqlora.core.plan import Plan
    from nbqlora.core.report import Report, VramReport
    from nbqlora.notebook import teach
    from nbqlora.notebook.compare_widget import compare_widget
    from nbqlora.notebook.planner_widget import planner_widget
    from nbqlora.notebook.timeline import timeline
    from nbqlora.own_loop import load, optimize, restore
    from nbqlora.run import Run


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOME:
        raise AttributeError(f"module 'nbqlora' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext nbqlora``: register the magics."""
    from nbqlora.notebook.magics import register

    register(shell)
