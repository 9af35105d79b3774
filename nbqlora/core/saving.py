"""What keeping a run's result will take, and where there is room for it: known before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Room:
    """A folder that files could go to.

    Args:
        path: as a person writes it.
        free_bytes: of its disk.
        stays: it outlives the session; None where nobody knows.
        holds_cache: the hub's cache lies on the same disk, so that a download takes from it.
    """

    path: str
    free_bytes: int
    stays: bool | None = None
    holds_cache: bool = False


@dataclass(frozen=True, kw_only=True)
class SavingNeeds:
    """What writing the parts of a result takes.

    Args:
        adapter_bytes: disk of the adapter.
        checkpoint_bytes: disk of one checkpoint: adapter and optimizer state.
        n_checkpoints: those that are kept, and one while it is written.
        small_bytes: disk of tokenizer, states and reports.
        merged_bytes: disk of the merged model, by dtype.
        gguf_bytes: disk of a GGUF file, by type.
        between_bytes: disk of the GGUF file that another one is made from, by the latter's type; 0 for none.
        ram_bytes: RAM that a merge takes beside what the process holds.
        gguf_ram_bytes: RAM that making a GGUF file takes, by type.
        vram_bytes: memory of the card that a merge takes at most; 0 where there is none.
    """

    adapter_bytes: int
    checkpoint_bytes: int
    n_checkpoints: int
    small_bytes: int
    merged_bytes: Mapping[str, int]
    gguf_bytes: Mapping[str, int]
    between_bytes: Mapping[str, int]
    ram_bytes: int
    gguf_ram_bytes: Mapping[str, int]
    vram_bytes: int

    @property
    def run_bytes(self) -> int:
        """Disk of all that a run writes by itself."""
        return self.adapter_bytes + self.n_checkpoints * self.checkpoint_bytes + self.small_bytes

    def export_bytes(self, gguf_type: str) -> int:
        """Disk that making a GGUF file of this type takes."""
        return self.gguf_bytes[gguf_type] + self.between_bytes[gguf_type]
