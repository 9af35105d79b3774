"""A stand-in for the hub on this machine: real HTTP, with the headers and error codes of the real one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download

COMMIT = "a" * 40
GOOD_TOKEN, NARROW_TOKEN, BAD_TOKEN = "hf_goodSecretGood", "hf_narrowSecretNarrow", "hf_badSecretBad"
FINE_GRAINED = "Please enable access to public gated repositories in your fine-grained token settings"
SIZES = {"model-00001-of-00002.safetensors": 4000, "model-00002-of-00002.safetensors": 3000,
         "consolidated.safetensors": 7000, "original/model.safetensors": 7000, "README.md": 10}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: Path

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if token == BAD_TOKEN:
            return self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        name = self.path.removeprefix("/datasets").strip("/").split("/")[1:2]
        return self.of_repository(name[0] if "resolve" in self.path else "", token)

    do_GET = do_HEAD

    def of_repository(self, name: str, token: str) -> None:
        match name:
            case "gated" if token == NARROW_TOKEN:
                self.answer(403, {"X-Error-Message": FINE_GRAINED})
            case "gated":
                self.answer(403 if token else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
            case "missing":
                self.answer(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            case "bare401" | "bare404":
                self.answer(int(name[-3:]))
            case "gguf":
                self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            case "busy":
                self.answer(503)
            case "portal":
                self.answer(200, body=b"please log in")
            case "hangs":
                time.sleep(20)
            case "tiny":
                self.of_file(self.files / self.path.rsplit("/", 1)[-1])
            case "":
                self.of_site()
            case _:
                self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": '"1"'}, body=b"{}")

    def of_file(self, file: Path) -> None:
        if not file.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = file.read_bytes()
        return self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{file.name}"'}, body=content)

    def of_site(self) -> None:
        if self.path.startswith("/api/models/"):
            files = [{"rfilename": name, "size": size} for name, size in SIZES.items()]
            model = {"id": "org/open", "sha": COMMIT, "siblings": files}
            return self.answer(200, {"Content-Type": "application/json"}, body=json.dumps(model).encode())
        return self.answer(200)


@contextmanager
def hub_server(files: Path = Path("/nowhere")) -> Iterator[str]:
    """Its address; ``org/tiny`` is served from ``files``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Handler,), {"files": files}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def closed_address() -> str:
    """An address of this machine where nothing listens."""
    with hub_server() as address:
        return address


def point_to(address: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has the hub at ``address``, its cache and login file in ``home``, and no token beside it."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # releases differ in which of the two is read
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
