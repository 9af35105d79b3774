"""Writing a GGUF file from front to back, its digest on the way.

The gguf library writes the head: values, and a list of tensors with their places. What follows is rows, one after
another, each tensor padded to 32 bytes. Nothing is ever gone back to, so that the digest needs no second reading.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from nbqlora.core.errors import OutOfDiskError
from nbqlora.core.units import format_bytes
from nbqlora.hub.atomic import HIDDEN, hidden_beside, sync
from nbqlora.hub.gguf.tensors import Rows, Tensor
from nbqlora.hub.gguf.vocabulary import Vocabulary

Value = int | float | bool | str
_ALIGNMENT = 32


def written_bytes(tensors: Iterable[Tensor], factors: Mapping[str, Rows]) -> int:
    """Size of all tensors in the file."""
    return sum(map(_padded, [*(t.storage.n_bytes for t in tensors), *(f.nbytes for f in factors.values())]))


def write_file(
    path: Path,
    arch: str,
    values: Mapping[str, Value],
    vocabulary: Vocabulary,
    factors: Mapping[str, Rows],
    tensors: Sequence[Tensor],
    rows_of: Callable[[Tensor], Iterator[Rows]],
    told: Callable[[int], None],
) -> str:
    """Write the whole file to ``path``, which is there and empty.

    Args:
        values: by key, without the architecture where it does not begin with ``general``.
        factors: small tensors, given whole.
        rows_of: a tensor's stored bytes in order.
        told: called with the bytes of tensors written so far.

    Returns:
        its SHA-256.
    """
    _write_head(path, arch, values, vocabulary, factors, tensors)
    with path.open("rb") as head:
        digest = hashlib.file_digest(head, "sha256")
    done = 0
    with path.open("ab") as out:

        def put(data: Any) -> int:
            digest.update(data)
            return out.write(data)

        put(bytes(-out.tell() % _ALIGNMENT))
        for part in [*([[f] for f in factors.values()]), *(rows_of(t) for t in tensors)]:
            size = 0
            for rows in part:
                size += put(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
                told(done + size)
            done += size + put(bytes(-size % _ALIGNMENT))
    return digest.hexdigest()


def _write_head(
    path: Path,
    arch: str,
    values: Mapping[str, Value],
    vocabulary: Vocabulary,
    factors: Mapping[str, Rows],
    tensors: Sequence[Tensor],
) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, arch)
    try:
        for key, value in values.items():
            _add(writer, key if key.startswith("general.") else f"{arch}.{key}", value)
        _add_vocabulary(writer, vocabulary)
        for name, factor in factors.items():
            writer.add_tensor_info(name, factor.shape, np.dtype(np.float32), factor.nbytes)
        for tensor in tensors:
            kind = GGMLQuantizationType[tensor.storage.kind]
            # With a raw type and a dtype other than uint8, the shape is taken as it is: in weights.
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.storage.n_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Value) -> None:
    # A bool is an int in Python and not in GGUF.
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](key, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    special = vocabulary.special
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges(vocabulary.merges)
    for word, i in special.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{word}_token_id", i)
    writer.add_add_bos_token(special.adds_bos)
    writer.add_add_eos_token(special.adds_eos)
    writer.add_add_space_prefix(vocabulary.space_first)
    _add_templates(writer, special.chat_template)


def _add_templates(writer: Any, templates: Mapping[str, str]) -> None:
    # The library's own function puts the names in an order that changes from run to run.
    others = sorted(set(templates) - {"default"})
    writer.add_string("tokenizer.chat_template", templates.get("default", ""))
    for name in others:
        writer.add_string(f"tokenizer.chat_template.{name}", templates[name])
    writer.add_array("tokenizer.chat_templates", others)


def _padded(n_bytes: int) -> int:
    return n_bytes + -n_bytes % _ALIGNMENT


@contextmanager
def new_file(target: Path, folder: Path | None = None) -> Iterator[Path]:
    """An empty hidden file that only this block has, for ``target`` or for what it is made from.

    It is removed when the block ends, unless the block has renamed it. Those that killed processes left for the same
    target are removed first; a living one keeps a lock on its own.

    Args:
        folder: where it is; beside the target when None.
    """
    beside = (folder or target.parent) / target.name
    for left in beside.parent.glob(f"{HIDDEN}{_escaped(target.name)}-*"):
        _remove_if_left(left)
    temporary = hidden_beside(beside)
    with temporary.open("xb") as held:
        if not _locked(held):
            # Without locks it need not be held, and some systems rename no file that is open.
            held.close()
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def publish(temporary: Path, target: Path) -> None:
    """Make a written file the target, in place of an older one."""
    sync(temporary)
    temporary.replace(target)
    sync(target.parent)


@contextmanager
def full_disk_told(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Turn the system's word for a full disk into :class:`OutOfDiskError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise full_disk(folder, needed_bytes) from error


def full_disk(folder: Path, needed_bytes: int) -> OutOfDiskError:
    """The error for a disk that was full before everything was written."""
    return OutOfDiskError(
        f"the disk of {folder} became full; the export needs {format_bytes(needed_bytes)} there, nothing of it was kept"
    )


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _remove_if_left(left: Path) -> None:
    with suppress(OSError, ImportError), left.open("rb") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left.unlink()


def _locked(file: Any) -> bool:
    """Tell other processes that the file is in use; False where the system or the disk knows no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, ImportError):
        return False
    return True
