"""The composition root: the nine steps of the main job in order, and ``Run``, their result.

Its names are resolved on first use: ``run.doctor`` must answer where torch, which the steps need, is broken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Run", "finetune", "make_plan"]

if TYPE_CHECKING:
    from nbqlora.run.result import Run
    from nbqlora.run.steps import finetune, make_plan


def __getattr__(name: str) -> Any:
    if name == "Run":
        from nbqlora.run.result import Run

        return Run
    if name in __all__:
        from nbqlora.run import steps

        return getattr(steps, name)
    raise AttributeError(f"module 'nbqlora.run' has no attribute {name!r}")
