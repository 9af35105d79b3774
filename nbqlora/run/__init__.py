"""The composition root: the nine steps of the main job in order, and ``Run``, their result."""

from nbqlora.run.result import Run
from nbqlora.run.steps import finetune, make_plan

__all__ = ["Run", "finetune", "make_plan"]
