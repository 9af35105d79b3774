"""A model's tensors -> one GGUF file that llama.cpp loads and that gives transformers' tokens.

In order: what could fail for a reason that is known at the start is looked at first (quantization, family, config,
tensor names, tokenizer, room on the disk, llama.cpp's quantizer), before a byte is written. Then the file is written
under a hidden name beside the target, a few rows at a time; synced; renamed. A killed export leaves the target as it
was, and a hidden file that the next export to the same target removes.

Measured (2 CPU cores, SmolLM2-135M from bf16 safetensors): Q8_0 1.9 s, Q4_0 1.9 s, Q4_K_M 5.4 s, IQ4_XS about a minute.
Memory: a piece of a tensor, and the tokenizer while it is read: 55 MiB for the 49k tokens of SmolLM2, 8 MiB for a head
of 16000 x 1024 with a small tokenizer (a test bounds it).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from nbqlora.core.errors import ModelError
from nbqlora.core.merged import ExportedGguf
from nbqlora.hub.atomic import check_room
from nbqlora.hub.gguf import kquants
from nbqlora.hub.gguf.contents import Contents, read_contents
from nbqlora.hub.gguf.file import full_disk_told, new_file, publish, write_file, written_bytes
from nbqlora.hub.gguf.quantizations import K_QUANTS, check_name
from nbqlora.hub.gguf.tensors import stored_rows, type_counts
from nbqlora.hub.sealed import sha256
from nbqlora.hub.weights import WeightStream

Say = Callable[[float, str], None]
# For the head of the file beside its vocabulary, and so that an export does not take the last block of a disk.
_ROOM_BYTES = 16 << 20
# Of the time of a K-quant, writing the file in between (2 CPU cores, demo model: 1.6 of 5.4 s).
_BETWEEN_SHARE = 0.3


def export_gguf(
    weights: WeightStream,
    path: Path,
    quantization: str = "Q8_0",
    *,
    name: str = "",
    temporary_location: Path | None = None,
    say: Say = lambda share, text: None,
) -> ExportedGguf:
    """Write ``path``, whole and synced before it has its name; a file that is there is replaced at the end.

    Args:
        quantization: ``F32``, ``F16``, ``BF16``, ``Q8_0``, ``Q5_1``, ``Q5_0``, ``Q4_1``, ``Q4_0``, or a K-quant such as
            ``Q4_K_M``, for which ``nbqlora[gguf]`` must be installed.
        name: of the model, for those who list the file; the file's own when "".
        temporary_location: folder for the 16-bit file that a K-quant is made from; beside ``path`` when None.
        say: called with the share that is done, 0 to 1, and what is being done.

    Raises:
        ModelError: llama.cpp could not compute or tokenize this model as transformers does, or a value is broken.
        OutOfDiskError: the disk has too little room, or became full; nothing is left of the attempt.
    """
    quantization = check_name(quantization)
    is_k_quant = quantization in K_QUANTS
    if is_k_quant:
        kquants.check_quantizer()
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give the name of a file, such as {path / 'model.gguf'}")
    written = kquants.file_between(weights) if is_k_quant else quantization
    contents = read_contents(weights, written, name or path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_k_quant:
        return _export_k_quant(weights, contents, path, quantization, temporary_location or path.parent, say)
    n_bytes = _needed_bytes(contents)
    check_room(path.parent, n_bytes, f"the GGUF file in {quantization}", "choose fewer bits or free some room")
    with new_file(path) as temporary, full_disk_told(path.parent, n_bytes):
        digest = _write(weights, contents, temporary, lambda share: say(share, f"writing {path.name}"))
        publish(temporary, path)
    return _exported(path, digest, quantization, contents, type_counts(contents.tensors))


def _export_k_quant(
    weights: WeightStream, contents: Contents, path: Path, quantization: str, between_at: Path, say: Say
) -> ExportedGguf:
    between_at.mkdir(parents=True, exist_ok=True)
    between_bytes = _needed_bytes(contents)
    result_bytes = kquants.expected_bytes(contents.tensors, quantization) + _ROOM_BYTES
    _check_both_rooms(path.parent, result_bytes, between_at, between_bytes, quantization)
    kind = kquants.file_between(weights)
    with ExitStack() as stack:
        temporary = stack.enter_context(new_file(path))
        between = stack.enter_context(new_file(path, between_at))
        with full_disk_told(between_at, between_bytes):
            _write(weights, contents, between, lambda s: say(s * _BETWEEN_SHARE, f"writing {kind} to quantize from"))

        def told(size: int) -> None:
            share = min(size / result_bytes, 0.99)
            say(_BETWEEN_SHARE + share * (1 - _BETWEEN_SHARE), f"quantizing {path.name} to {quantization}")

        kquants.quantize(between, temporary, quantization, told)
        counts = kquants.type_counts(temporary)
        digest = sha256(temporary)
        with full_disk_told(path.parent, result_bytes):
            publish(temporary, path)
    say(1.0, f"quantizing {path.name} to {quantization}")
    return _exported(path, digest, quantization, contents, counts, kquants.fallback_notes(contents.tensors))


def _write(weights: WeightStream, contents: Contents, path: Path, told: Callable[[float], None]) -> str:
    whole = written_bytes(contents.tensors, contents.factors)
    return write_file(
        path,
        contents.arch,
        contents.values,
        contents.vocabulary,
        contents.factors,
        contents.tensors,
        lambda tensor: stored_rows(weights, tensor),
        lambda done: told(done / whole),
    )


def _needed_bytes(contents: Contents) -> int:
    return written_bytes(contents.tensors, contents.factors) + contents.vocabulary.n_bytes + _ROOM_BYTES


def _check_both_rooms(folder: Path, result_bytes: int, between_at: Path, between_bytes: int, quantization: str) -> None:
    advice = "free some room, or give another disk as temporary_location"
    if os.stat(folder).st_dev == os.stat(between_at).st_dev:
        what = f"the GGUF file in {quantization}, with the 16-bit file that it is made from,"
        check_room(folder, result_bytes + between_bytes, what, advice)
    else:
        check_room(folder, result_bytes, f"the GGUF file in {quantization}", "choose fewer bits or free some room")
        check_room(between_at, between_bytes, f"the 16-bit file that {quantization} is made from", advice)


def _exported(
    path: Path,
    digest: str,
    quantization: str,
    contents: Contents,
    counts: Mapping[str, int],
    notes: tuple[str, ...] = (),
) -> ExportedGguf:
    return ExportedGguf(
        path=str(path),
        n_bytes=path.stat().st_size,
        sha256=digest,
        quantization=quantization,
        architecture=contents.arch,
        n_tensors=sum(counts.values()),
        tensor_types=counts,
        notes=(*contents.notes, *notes),
    )
