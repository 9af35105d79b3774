"""The part of a hub that takes uploads, over real HTTP: accounts, repositories, LFS objects, commits.

Large files go to an address of their own without a token, as on the real hub; what was committed lies in a folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from tests.hub.hub_server import BAD_TOKEN, COMMIT, GOOD_TOKEN, Handler

READ_TOKEN, FINE_TOKEN = "hf_readSecretRead", "hf_fineSecretFine"
ACCOUNTS = {GOOD_TOKEN: "write", READ_TOKEN: "read", FINE_TOKEN: "fineGrained"}
NO_RIGHTS = "You don't have the rights to create a model under the namespace"


@dataclass
class Store:
    """What the hub holds.

    Args:
        root: a folder for each branch of each repository.
        private: whether it is, by repository.
        requests: method, path, token and body of each.
        refuse: answers of one's own: a status, by a part of the path.
    """

    root: Path
    private: dict[str, bool] = field(default_factory=dict)
    branches: set[tuple[str, str]] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    requests: list[tuple[str, str, str, bytes]] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)

    def folder(self, repo: str, branch: str = "main") -> Path:
        return self.root / repo / branch


class UploadHandler(Handler):
    store: Store
    # Head and body are sent as two: without this the second waits 40 ms for the other side.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.take(b"")

    def do_HEAD(self) -> None:
        self.take(b"")

    def do_POST(self) -> None:
        self.take(self.body())

    def do_PUT(self) -> None:
        self.take(self.body())

    def body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def json(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def take(self, body: bytes) -> None:
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        self.store.requests.append((self.command, self.path, token, body))
        for part, status in self.store.refuse.items():
            if part in self.path:
                return self.answer(status, {"X-Error-Message": "as the test wants it"})
        if self.path.startswith("/lfs/"):
            return self.of_object(body)
        if token == BAD_TOKEN or (token not in ACCOUNTS and "whoami" in self.path):
            return self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        path = self.path.partition("?")[0]
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, path):
                return getattr(self, method)(*match.groups(), token=token, body=body)
        return super().do_HEAD()

    def whoami(self, *, token: str, body: bytes) -> None:
        access = {"displayName": "a token", "role": ACCOUNTS[token]}
        self.json({"name": "me", "orgs": [{"name": "club"}], "auth": {"type": "access_token", "accessToken": access}})

    def check_page(self, *, token: str, body: bytes) -> None:
        text = json.loads(body)["content"]
        try:
            wrong = "" if isinstance(yaml.safe_load(text.split("---")[1]), dict) else "it is no mapping"
        except (yaml.YAMLError, IndexError) as error:
            wrong = str(error)
        self.json({"errors": [{"message": wrong}] if wrong else [], "warnings": []}, 400 if wrong else 200)

    def create(self, *, token: str, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if token != GOOD_TOKEN:
            return self.answer(403, {"X-Error-Message": NO_RIGHTS})
        value = {"url": f"{self.address}/{repo}", "name": repo, "id": repo}
        if repo in self.store.private:
            return self.json(value, 409)
        self.store.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
        return self.json(value)

    def look(self, repo: str, *, token: str, body: bytes) -> None:
        if repo not in self.store.private:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        return self.json({"id": repo, "sha": COMMIT, "private": self.store.private[repo], "siblings": [], "tags": []})

    def branch(self, repo: str, name: str, *, token: str, body: bytes) -> None:
        there = (repo, name) in self.store.branches
        self.store.branches.add((repo, name))
        self.json({}, 409 if there else 200)

    def preupload(self, repo: str, branch: str, *, token: str, body: bytes) -> None:
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".gguf", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self.json({"files": files})

    def batch(self, repo: str, *, token: str, body: bytes) -> None:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.address}/lfs/{o['oid']}?signature=secretSignature"}}}
            for o in json.loads(body)["objects"]
        ]
        self.json({"transfer": "basic", "objects": objects})

    def of_object(self, body: bytes) -> None:
        oid = self.path.split("/")[2].partition("?")[0]
        fine = hashlib.sha256(body).hexdigest() == oid
        self.store.objects[oid] = body
        self.answer(200 if fine else 400)

    def commit(self, repo: str, branch: str, *, token: str, body: bytes) -> None:
        folder = self.store.folder(repo, branch)
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                self.store.messages.append(value["summary"])
                continue
            content = base64.b64decode(value["content"]) if key == "file" else self.store.objects[value["oid"]]
            (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / value["path"]).write_bytes(content)
        self.json({"commitUrl": f"{self.address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "pullRequestUrl": None})


ROUTES = (
    (r"/api/whoami-v2", "whoami"),
    (r"/api/validate-yaml", "check_page"),
    (r"/api/repos/create", "create"),
    (r"/api/models/([^/]+/[^/]+)", "look"),
    (r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
    (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
    (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
)


@contextmanager
def upload_server(root: Path) -> Iterator[tuple[str, Store]]:
    """Its address and what it holds."""
    store = Store(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (UploadHandler,), {"store": store, "files": root}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", store
    finally:
        server.shutdown()
        server.server_close()
