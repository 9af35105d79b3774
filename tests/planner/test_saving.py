"""What saving takes, against figures of published files; and what is said where there is too little room."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nbqlora import view
from nbqlora.core.plan import Plan
from nbqlora.core.saving import Room
from nbqlora.core.specs import DeviceSpec
from nbqlora.planner.saving import no_room_to_run, room_elsewhere, saving_needs
from tests.planner.shapes import DEVICES, GIB, MODELS, options, plan

view.register_all()

LLAMA_8B, LLAMA_1B = MODELS["8B"], MODELS["1B"]


def room(path: str, gib: float, **more: Any) -> Room:
    return Room(path=path, free_bytes=int(gib * GIB), **more)


def needs(model: str = "8B", **changes: Any) -> Any:
    return saving_needs(options(**changes), MODELS[model], on_card=True)


@pytest.mark.parametrize(
    ("model", "file", "published"),
    [  # bytes of Llama-3.1-8B's and Llama-3.2-1B's files as others have published them
        ("8B", "Q8_0", 8.54e9), ("8B", "Q4_K_M", 4.92e9), ("8B", "F16", 16.07e9), ("8B", "bf16", 16.06e9),
        ("1B", "Q8_0", 1.32e9), ("1B", "F16", 2.48e9), ("1B", "bf16", 2.47e9),
    ],
)  # fmt: skip
def test_files_are_as_large_as_published_ones(model: str, file: str, published: float) -> None:
    found = needs(model)
    size = found.merged_bytes[file] if file == "bf16" else found.gguf_bytes[file]
    assert size == pytest.approx(published, rel=0.02)


def test_a_tied_head_is_counted_once_and_a_k_quant_with_what_it_is_made_from() -> None:
    untied = replace(LLAMA_1B, n_params=LLAMA_1B.n_params + LLAMA_1B.vocab_size * LLAMA_1B.d_model)
    more = saving_needs(options(), untied, on_card=False).merged_bytes["fp32"] - needs("1B").merged_bytes["fp32"]
    assert more == 4 * LLAMA_1B.vocab_size * LLAMA_1B.d_model
    found = needs()
    assert found.export_bytes("Q4_K_M") == found.gguf_bytes["Q4_K_M"] + found.gguf_bytes["F16"]
    assert found.export_bytes("Q8_0") == found.gguf_bytes["Q8_0"]


def test_a_checkpoint_holds_the_optimizers_states() -> None:
    adapter = needs().adapter_bytes
    assert adapter == 41_943_040 * 4  # rank 16 on all linears of 8B
    assert needs(optim="adamw_torch").checkpoint_bytes == 3 * adapter
    assert needs(optim="adamw_8bit").checkpoint_bytes == pytest.approx(1.51 * adapter, rel=0.01)
    assert needs(trl={"save_total_limit": 5}).n_checkpoints == 6 and needs().n_checkpoints == 3
    assert needs(trl={"save_total_limit": 0}).n_checkpoints == 3, "refused elsewhere, when the run begins"
    assert needs().run_bytes == adapter + 3 * 3 * adapter + needs().small_bytes


def test_memory_for_a_merge_does_not_grow_with_the_model() -> None:
    assert needs("70B").ram_bytes - needs("70B").adapter_bytes == needs("1B").ram_bytes - needs("1B").adapter_bytes
    assert saving_needs(options(), LLAMA_8B, on_card=False).vram_bytes == 0 < needs().vram_bytes <= GIB // 2


def test_a_run_without_room_says_what_it_writes_and_where_it_would_fit() -> None:
    here = room("/kaggle/working/a", 1.2, stays=True)
    others = [room("/small", 1), room("/kaggle/temp", 60, stays=False), room("/mnt", 7)]
    assert no_room_to_run(needs(), LLAMA_8B, [room("/kaggle/working/a", 1.7)]) == ""
    assert no_room_to_run(needs(), LLAMA_8B, [here, *others]) == (
        "this run writes up to 1.6 GiB (adapter 0.16 GiB, 2 checkpoints of 0.47 GiB and one while it is written), and "
        "/kaggle/working/a has 1.2 GiB free; there is room in /mnt (7.0 GiB free) and in /kaggle/temp (60.0 GiB free, "
        "lost with this session): name a folder there as output_dir"
    )
    one = needs(trl={"save_total_limit": 1})
    assert "1 checkpoint of 0.47 GiB and one while" in no_room_to_run(one, LLAMA_8B, [room("a", 0)])


def test_what_is_still_to_be_downloaded_counts_on_its_disk() -> None:
    model = replace(LLAMA_8B, download_bytes=15 * GIB)
    assert no_room_to_run(needs(), model, [room("a", 16)]) == ""
    said = no_room_to_run(needs(), model, [room("a", 16, holds_cache=True), room("b", 16, holds_cache=True)])
    assert "a has 1.0 GiB free after the download; no other folder here has room for it either: free some" in said
    assert (
        room_elsewhere(GIB, None, [room("b", 16, holds_cache=True)], "go") == "there is room in b (16.0 GiB free): go"
    )


def planned(*rooms: Room, device: DeviceSpec = DEVICES["T4"], **changes: Any) -> Plan:
    return plan("8B", replace(device, rooms=rooms), **changes)


def test_a_merge_without_room_is_a_note_with_where_it_would_fit() -> None:
    found = planned(room("/content/drive/MyDrive/a", 5), room("/content", 41, stays=False))
    assert found.notes[-1] == (
        "a merge needs 15.0 GiB of disk beside the 1.6 GiB of this run, and /content/drive/MyDrive/a has 5.0 GiB free; "
        "there is room in /content (41.0 GiB free, lost with this session): merge into a folder there"
    )
    assert not [n for n in planned(room("a", 17)).notes if "merge" in n]
    assert planned(room("a", 16)).notes[-1].endswith("a has 16.0 GiB free; free some room")


def test_what_needs_more_ram_than_there_is_is_a_note() -> None:
    def said(gib: float) -> list[str]:
        small = replace(DEVICES["T4"], host_free_bytes=int(gib * GIB))
        return [n for n in planned(room("a", 100), device=small).notes if n.startswith("RAM")]

    assert said(12.7) == []
    assert said(2) == ["RAM: 2.0 GiB are free now, and for GGUF in Q4_K_M 2.4 GiB are needed"]
    assert said(0.25)[0].endswith("and for a merge 0.45 GiB and for GGUF in Q4_K_M 2.4 GiB are needed")


def test_the_plan_shows_what_comes_afterwards() -> None:
    found = plan("8B")
    (line,) = (n for n, text in enumerate(str(found).splitlines()) if text.startswith("  afterwards"))
    lines = str(found).splitlines()
    assert " ".join(" ".join(lines[line : line + 2]).split()) == (
        "afterwards merge needs 0.45 GiB of 12.0 GiB RAM 15.0 GiB of 100 GiB disk in bf16, 0.50 GiB VRAM at most; "
        "GGUF: Q8_0 8.0 GiB, Q4_K_M 4.5 GiB and 15.0 GiB in between"
    )
    assert "VRAM" not in str(plan("1B", replace(DEVICES["CPU"], free_bytes=60 * GIB, total_bytes=64 * GIB)))
    assert found.as_dict()["saving"]["adapter_bytes"] == found.disk_bytes
