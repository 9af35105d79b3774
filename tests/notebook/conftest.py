"""The kernels that notebooks run on: the one that is installed, and Colab's."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["installed", "colab"])
def kernel_packages(request: pytest.FixtureRequest) -> Path | None:
    """What stands before ``site-packages`` in a kernel: nothing, or Colab's ipykernel and IPython."""
    if request.param == "installed":
        return None
    from tests.notebook.kernels import OLD, folder_or_skip

    return folder_or_skip(OLD)
