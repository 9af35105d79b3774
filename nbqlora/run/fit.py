"""``%vram --fit``: whether a model fits here, from its config and the planner. No weights are read, no CUDA started.

Without ``data`` the rows are assumed to be the worst that ``max_length`` allows, full and learned from end to end: what
fits then, fits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nbqlora.core.config import FinetuneConfig, validate
from nbqlora.core.errors import DoesNotFitError
from nbqlora.core.fit import FitReport
from nbqlora.core.plan import Plan
from nbqlora.core.request import CellRequest
from nbqlora.core.specs import BatchLayout, DataStats, DeviceSpec
from nbqlora.engine.quiet import quiet_libraries
from nbqlora.hub.inspect import read_spec
from nbqlora.memory.outlook import device_outlook
from nbqlora.planner import make_plan
from nbqlora.run.holdings import holdings
from nbqlora.run.look import look, place_of
from nbqlora.run.session import Session, finished
from nbqlora.run.tables import table_fields

# As many as make a run of a few dozen steps: what is said of the number of rows is not about these.
ASSUMED_ROWS = 1024
# Of a plan's decisions, those that say how it would run.
SHOWN = ("weights", "batch", "layers", "MLP", "embedding", "host RAM", "memory")


def fit(request: CellRequest, device: DeviceSpec | None = None) -> FitReport:
    """Plan the model on this machine.

    Args:
        request: the options; ``data`` may be missing.
        device: the machine to plan for; None looks at this one.

    Raises:
        ConfigError: everything wrong with the options.
        ModelError, DataError: model or data cannot be read.
        DeviceError: nothing is known of the card before CUDA is started.
    """
    has_data = "data" in request.options
    options = request.options if has_data else {**request.options, "data": []}
    config = validate(replace(request, options=options), table_fields=table_fields)
    with quiet_libraries(progress_bars=True):
        found = device or device_outlook(given_back_bytes=sum(_held(session) for session in finished()))
        try:
            plan = _planned(config, found, has_data)
        except DoesNotFitError as error:
            return FitReport(model=config.model, plan=None, lines=_lines(str(error).splitlines(), has_data, found))
    told = [f"{d.name}: {d.value}{f' ({d.because})' if d.because else ''}" for d in plan.decisions if d.name in SHOWN]
    return FitReport(model=config.model, plan=plan, lines=_lines(told, has_data, found))


def _planned(config: FinetuneConfig, device: DeviceSpec, has_data: bool) -> Plan:
    if has_data:
        seen = look(config, "fit", lambda line: None, device)
        spec, data = seen.spec, seen.train.stats
    else:
        spec = read_spec(config.model, place_of(config, lambda line: None), trust_remote_code=config.trust_remote_code)
        data = _assumed(config)
    return make_plan(config, spec, device, data, output_dir=str(Path(config.output_dir or ".")))


def _assumed(config: FinetuneConfig) -> DataStats:
    layout = BatchLayout.PACKED if config.packing in (True, "auto") else BatchLayout.PADDED
    return DataStats.full(ASSUMED_ROWS, config.max_length, layout=layout)


def _lines(told: list[str], has_data: bool, device: DeviceSpec) -> tuple[str, ...]:
    assumed = [] if has_data else ["assumed: rows as long as max_length, all learned; data = ... makes it exact"]
    return tuple(line.strip() for line in (*told, *assumed, *device.notes))


def _held(session: Session) -> int:
    return sum(holdings(session.loaded).values()) if session.loaded is not None else 0
