"""A process that is one of several which train together: what its environment says, as ``torchrun`` writes it.

``torchrun``, ``accelerate launch``, a batch script and the notebook's own workers all say it with the same variables.
Standard library only: a command has to choose its card before anything that may start CUDA is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from nbqlora.core.errors import RunError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
VISIBLE = "CUDA_VISIBLE_DEVICES"
# What accelerate takes for a sign of several processes: a rank's trainer is to think that it is alone.
SIGNS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Which of the processes this is.

    Args:
        number: among all; 0 writes the files.
        n: of all.
        local: among those of this machine.
        n_local: of this machine.
    """

    number: int = 0
    n: int = 1
    local: int = 0
    n_local: int = 1

    @property
    def first(self) -> bool:
        """It writes the files, and speaks."""
        return self.number == 0

    @property
    def alone(self) -> bool:
        """It trains by itself."""
        return self.n == 1

    @property
    def n_nodes(self) -> int:
        """Machines, as many processes on each."""
        return -(-self.n // self.n_local)


ALONE = Rank()


def rank_of(environ: Mapping[str, str]) -> Rank:
    """What the environment says; :data:`ALONE` where it says nothing.

    Raises:
        RunError: it says a part, or what cannot be.
    """
    if "RANK" not in environ or environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    missing = [name for name in NEEDED if not environ.get(name)]
    if missing:
        lacking = ", ".join(missing)
        raise RunError(f"RANK is set and {lacking} is not; start the ranks with torchrun, or set all of them")
    n = _number(environ, "WORLD_SIZE", environ["WORLD_SIZE"])
    number = _number(environ, "RANK", environ["RANK"])
    n_local = _number(environ, "LOCAL_WORLD_SIZE", str(n))
    local = _number(environ, "LOCAL_RANK", str(number % max(1, n_local)))
    if not (0 <= number < n and 0 <= local < n_local <= n):
        said = f"RANK {number} of WORLD_SIZE {n}, LOCAL_RANK {local} of LOCAL_WORLD_SIZE {n_local}"
        raise RunError(f"these variables do not fit together: {said}; start the ranks with torchrun")
    return Rank(number=number, n=n, local=local, n_local=n_local)


def _number(environ: Mapping[str, str], name: str, default: str) -> int:
    text = environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise RunError(f"{name} = {text!r} is no whole number; start the ranks with torchrun") from None


def see_one_card(rank: Rank, environ: MutableMapping[str, str]) -> None:
    """Let this process see its own card alone, which is then card 0 for every library; before CUDA is started.

    Where one card is visible already, as a batch system gives one to each task, that is it.

    Raises:
        RunError: fewer cards are visible than processes were started here.
    """
    given = environ.get(VISIBLE)
    visible = [] if given is None else [name.strip() for name in given.split(",") if name.strip()]
    if rank.alone or len(visible) == 1 or given == "":
        return
    if visible and len(visible) < rank.n_local:
        few = f"{len(visible)} cards are visible ({VISIBLE} = {given!r}) and {rank.n_local} processes were started here"
        raise RunError(f"{few}; start as many as there are cards")
    environ[VISIBLE] = visible[rank.local] if visible else str(rank.local)


def without_signs(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Take the signs of several processes away; what was taken, to be put back."""
    return {name: environ.pop(name) for name in SIGNS if name in environ}
