"""The data report by itself: the rows as a run would see them, without a plan or a model's weights."""

from __future__ import annotations

from nbqlora.core.config import validate
from nbqlora.core.data_report import DataReport
from nbqlora.core.request import CellRequest
from nbqlora.engine.quiet import quiet_libraries
from nbqlora.run.layout import choose_layout
from nbqlora.run.look import encoded, place_of, tokenizer_of
from nbqlora.run.tables import table_fields


def data_report(request: CellRequest) -> DataReport:
    """Read, tokenize and count the training data.

    Raises:
        ConfigError, ModelError, DataError: as :func:`nbqlora.run.finetune`.
    """
    config = validate(request, table_fields=table_fields)
    with quiet_libraries(progress_bars=True):
        location = place_of(config, lambda line: None)
        layout = choose_layout(config, location)
        found = encoded(config, config.data, "train", tokenizer_of(config, location), layout, lambda line: None)
        return found.report
