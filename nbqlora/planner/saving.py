"""What keeping a result will take, from shapes alone; and what to say where there is too little room.

A run writes its adapter and a few checkpoints: without room for those it must not begin. A merged model and GGUF
files are for later, and may go elsewhere, so they are only told. They are streamed tensor by tensor
(:mod:`nbqlora.hub`): their RAM does not grow with the model, their disk does.
"""

from __future__ import annotations

from collections.abc import Sequence

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.saving import Room, SavingNeeds
from nbqlora.core.specs import DeviceSpec, ModelSpec
from nbqlora.core.units import MIB, format_bytes
from nbqlora.planner.standing import DTYPE_BYTES, OPTIMIZER_BYTES, adapter_params

# As the merge streams: one tensor's rows at a time, in RAM and on the card.
MERGE_RAM_BYTES, MERGE_VRAM_BYTES = 300 * MIB, 512 * MIB
# What hub.save and hub.checkpoint ask for beside the tensors: tokenizer, state.json, the disk's last blocks.
SMALL_BYTES = 64 * MIB
KEEP_DEFAULT = 2
# Bytes a weight. Q8_0: blocks of 32 with an fp16 scale; Q4_K_M: a mix of Q4_K and Q6_K, about 4.85 bits.
GGUF_BYTES = {"Q8_0": 34 / 32, "F16": 2.0, "Q4_K_M": 4.85 / 8}
# K-quants are made from a file in F16.
MADE_FROM = {"Q4_K_M": "F16"}
# Of a GGUF file's vocabulary: texts, their lengths, types and merges.
VOCAB_ENTRY_BYTES = 64


def saving_needs(config: FinetuneConfig, model: ModelSpec, *, on_card: bool) -> SavingNeeds:
    """What adapter, checkpoints, merge and GGUF files take. Adapters are kept in fp32, a tied head once."""
    n = adapter_params(model, config)
    gguf = {name: int(model.n_params * size) + _vocab_bytes(model) for name, size in GGUF_BYTES.items()}
    return SavingNeeds(
        adapter_bytes=n * 4,
        checkpoint_bytes=int(n * (4 + OPTIMIZER_BYTES[config.optim])),
        n_checkpoints=_kept(config) + 1,
        small_bytes=SMALL_BYTES,
        merged_bytes={dtype: model.n_params * size for dtype, size in DTYPE_BYTES.items()},
        gguf_bytes=gguf,
        between_bytes={name: gguf[MADE_FROM[name]] if name in MADE_FROM else 0 for name in gguf},
        ram_bytes=MERGE_RAM_BYTES + n * 4,
        gguf_ram_bytes={name: MERGE_RAM_BYTES + n * 4 + _whole_tensor_bytes(name, model) for name in gguf},
        vram_bytes=MERGE_VRAM_BYTES if on_card else 0,
    )


def _kept(config: FinetuneConfig) -> int:
    """Checkpoints that stay; a number that makes no sense is refused when the run begins."""
    asked = config.trl.get("save_total_limit")
    return asked if isinstance(asked, int) and asked >= 1 else KEEP_DEFAULT


def _whole_tensor_bytes(gguf_type: str, model: ModelSpec) -> int:
    """llama.cpp makes K-quants of whole tensors, in fp32; the largest is the embedding or the head."""
    return model.vocab_size * model.d_model * 4 if gguf_type in MADE_FROM else 0


def _vocab_bytes(model: ModelSpec) -> int:
    return model.vocab_size * VOCAB_ENTRY_BYTES


def rooms_of(device: DeviceSpec, output_dir: str) -> tuple[Room, ...]:
    """Where files could go, the output folder first."""
    return device.rooms or (Room(path=output_dir, free_bytes=device.disk_free_bytes),)


def no_room_to_run(needs: SavingNeeds, model: ModelSpec, rooms: Sequence[Room]) -> str:
    """Why the first of ``rooms`` cannot take what the run writes, and which can; "" when it can."""
    free = left_bytes(rooms[0], model)
    if free >= needs.run_bytes:
        return ""
    kept, each = needs.n_checkpoints - 1, format_bytes(needs.checkpoint_bytes)
    checkpoints = f"{kept} checkpoint{'s' if kept != 1 else ''} of {each} and one while it is written"
    where = room_elsewhere(needs.run_bytes, model, rooms[1:], "name a folder there as output_dir")
    return (
        f"this run writes up to {format_bytes(needs.run_bytes)} (adapter {format_bytes(needs.adapter_bytes)}, "
        f"{checkpoints}), and {rooms[0].path} has {_free(rooms[0], model)}; {where}"
    )


def notes(needs: SavingNeeds, device: DeviceSpec, model: ModelSpec, rooms: Sequence[Room]) -> list[str]:
    """What will not be possible after training where the run writes, and where it will."""
    found = []
    merged, first = needs.merged_bytes["bf16"], rooms[0]
    if left_bytes(first, model) < merged + needs.run_bytes:
        where = room_elsewhere(merged, model, rooms[1:], "merge into a folder there")
        beside = f"a merge needs {format_bytes(merged)} of disk beside the {format_bytes(needs.run_bytes)} of this run"
        found.append(f"{beside}, and {first.path} has {_free(first, model)}; {where}")
    ram = {"a merge": needs.ram_bytes, "GGUF in Q4_K_M": needs.gguf_ram_bytes["Q4_K_M"]}
    short = [f"for {what} {format_bytes(n)}" for what, n in ram.items() if n > device.host_free_bytes]
    if short:
        found.append(f"RAM: {format_bytes(device.host_free_bytes)} are free now, and {' and '.join(short)} are needed")
    return found


def room_elsewhere(n_bytes: int, model: ModelSpec | None, others: Sequence[Room], how: str) -> str:
    """Where so much would fit, at most two folders: one that stays goes first, then the largest.

    Args:
        model: what may still have to be downloaded; None for nothing.
        how: what to do with such a folder.
    """
    fitting = [r for r in others if left_bytes(r, model) >= n_bytes]
    best = sorted(fitting, key=lambda r: (r.stays is False, -left_bytes(r, model)))[:2]
    if not best:
        return "no other folder here has room for it either: free some" if others else "free some room"
    told = [f"{r.path} ({_free(r, model)}{', lost with this session' if r.stays is False else ''})" for r in best]
    return f"there is room in {' and in '.join(told)}: {how}"


def left_bytes(room: Room, model: ModelSpec | None) -> int:
    """What is free there once the model is downloaded."""
    to_download = (model.download_bytes or 0) if model is not None and room.holds_cache else 0
    return max(0, room.free_bytes - to_download)


def _free(room: Room, model: ModelSpec | None) -> str:
    left = left_bytes(room, model)
    after = " after the download" if left < room.free_bytes else ""
    return f"{format_bytes(left)} free{after}"
