"""Known noise is dropped, anything else still shows, and nothing stays behind."""

import logging
import warnings

import pytest
from transformers.utils import logging as hf_logging

from nbqlora.engine.quiet import quiet_libraries

KNOWN_WARNING = "`is_gradient_checkpointing` is deprecated and will be removed in v6."
KNOWN_LOG = "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'."


class Heard(logging.Handler):
    """What got as far as being shown."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def heard() -> Heard:
    handler = Heard()
    logging.getLogger().addHandler(handler)
    yield handler  # type: ignore[misc]
    logging.getLogger().removeHandler(handler)


def filters() -> list[int]:
    """Filters of every handler that ``quiet_libraries`` touches."""
    handlers = [*logging.getLogger("bitsandbytes").handlers, *logging.getLogger().handlers, logging.lastResort]
    return [len(h.filters) for h in handlers if h is not None]


def test_the_known_is_dropped_and_the_unknown_shows(heard: Heard) -> None:
    log = logging.getLogger("bitsandbytes.backends.cpu")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with quiet_libraries():
            warnings.warn(KNOWN_WARNING, FutureWarning, stacklevel=1)
            warnings.warn("`is_gradient_checkpointing` gave a wrong result", FutureWarning, stacklevel=1)
            warnings.warn(KNOWN_WARNING, UserWarning, stacklevel=1)
            log.warning(KNOWN_LOG)
            log.warning("the absmax of layer 3 is NaN")
            logging.getLogger("transformers").info("quiet")
    assert [str(w.message) for w in shown] == ["`is_gradient_checkpointing` gave a wrong result", KNOWN_WARNING]
    assert heard.texts == ["the absmax of layer 3 is NaN"]


def test_real_warnings_of_the_libraries_are_the_known_ones() -> None:
    from tests import tiny

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with quiet_libraries():
            tiny.with_lora(tiny.make_model())
    assert [str(w.message) for w in shown if issubclass(w.category, FutureWarning)] == []


@pytest.mark.parametrize("bars", [True, False])
def test_after_an_exception_everything_is_as_before(heard: Heard, bars: bool) -> None:
    was = hf_logging.is_progress_bar_enabled()
    (hf_logging.enable_progress_bar if bars else hf_logging.disable_progress_bar)()
    try:
        before, rules = filters(), list(warnings.filters)
        with pytest.raises(RuntimeError), quiet_libraries():
            assert not hf_logging.is_progress_bar_enabled()
            assert filters() != before and list(warnings.filters) != rules
            raise RuntimeError
        assert filters() == before and list(warnings.filters) == rules
        assert hf_logging.is_progress_bar_enabled() is bars
        logging.getLogger("bitsandbytes").warning(KNOWN_LOG)
        assert heard.texts == [KNOWN_LOG]
    finally:
        (hf_logging.enable_progress_bar if was else hf_logging.disable_progress_bar)()


def test_downloads_keep_their_bars() -> None:
    was = hf_logging.is_progress_bar_enabled()
    hf_logging.enable_progress_bar()
    try:
        with quiet_libraries(progress_bars=True):
            assert hf_logging.is_progress_bar_enabled()
    finally:
        if not was:
            hf_logging.disable_progress_bar()


def test_one_within_another(heard: Heard) -> None:
    before = filters()
    with quiet_libraries():
        with quiet_libraries():
            pass
        logging.getLogger("bitsandbytes").warning(KNOWN_LOG)
    assert heard.texts == [] and filters() == before
