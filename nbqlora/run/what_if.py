"""Plans for changed options, one after another: what is slow to look at is looked at once.

Rows are tokenized once for each ``max_length``. The machine is looked at once, so that plans differ by what was
changed, and not by what else took memory in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nbqlora.core.config import FinetuneConfig, validate
from nbqlora.core.errors import DoesNotFitError
from nbqlora.core.fit import FitReport
from nbqlora.core.request import CellRequest
from nbqlora.core.specs import DeviceSpec
from nbqlora.engine.quiet import quiet_libraries
from nbqlora.memory.outlook import device_outlook
from nbqlora.planner import make_plan
from nbqlora.run.fit import fit
from nbqlora.run.holdings import holdings
from nbqlora.run.look import Look, look
from nbqlora.run.session import finished
from nbqlora.run.tables import table_fields


class WhatIf:
    """Answers for one model, its data and a machine.

    Args:
        options: those of a run; without ``data``, rows as long as ``max_length`` are assumed.
        device: the machine to plan for; None for this one, with the memory of finished runs as free.
    """

    def __init__(self, options: Mapping[str, Any], device: DeviceSpec | None = None) -> None:
        self.options = dict(options)
        held = sum(n for s in finished() if s.loaded is not None for n in holdings(s.loaded).values())
        self.device = device or device_outlook(given_back_bytes=held)
        self._looks: dict[int, Look] = {}

    def __call__(self, **changes: Any) -> FitReport:
        """The plan with these options in place of those given at first, or why there is none.

        Raises:
            ConfigError, ModelError, DataError: as a run.
        """
        request = CellRequest(options={**self.options, **changes})
        if "data" not in request.options:
            return fit(request, self.device)
        config = validate(request, table_fields=table_fields)
        seen = self._seen(config)
        try:
            plan = make_plan(config, seen.spec, self.device, seen.train.stats, output_dir=str(seen.output_dir))
        except DoesNotFitError as error:
            lines = tuple(line.strip() for line in str(error).splitlines())
            return FitReport(model=config.model, plan=None, lines=lines)
        return FitReport(model=config.model, plan=plan, lines=())

    def _seen(self, config: FinetuneConfig) -> Look:
        if config.max_length not in self._looks:
            with quiet_libraries(progress_bars=True):
                found = look(config, "run", lambda line: None, self.device)
            self._looks[config.max_length] = replace(found, device=self.device)
        return self._looks[config.max_length]
