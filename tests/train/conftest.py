"""Quick runs for the whole package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.quick import quick_runs


@pytest.fixture(autouse=True, scope="package")
def quick() -> Iterator[None]:
    """See :func:`tests.quick.quick_runs`."""
    with quick_runs():
        yield
