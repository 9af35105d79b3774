"""The demo model's tokenizer, read once."""

from typing import Any

import pytest


@pytest.fixture(scope="session")
def demo_tokenizer() -> Any:
    from nbqlora.hub.demo_model import demo_model
    from nbqlora.hub.inspect import read_tokenizer

    return read_tokenizer(str(demo_model()))
