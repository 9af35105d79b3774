"""Errors of lessons: a teacher's or a student's misuse of :mod:`nbqlora.notebook.teach`, never a wrong answer."""

from __future__ import annotations

from nbqlora.core.errors import NbqloraError


class LessonError(NbqloraError, ValueError):
    """A lesson, an exercise or a notebook's copy was asked for in a way that cannot be."""


class NotPassedError(NbqloraError, AssertionError):
    """A teacher's copy ended with something that was not passed; with each of them."""
