"""A hub on this machine that speaks the few calls of the hub's client which a student needs."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml

TOKEN = "hf_test"


@dataclass
class Repository:
    """A repository: its files, and what its owner set."""

    private: bool = True
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, bytes]] = field(default_factory=list)

    @property
    def head(self) -> str:
        """The hash of the newest commit."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode(), usedforsecurity=False).hexdigest()


@dataclass
class Hub:
    """What the server holds, and how it fails."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files, by SHA-256
    uploads: list[str] = field(default_factory=list)  # SHA-256 of those that were sent
    writers: set[str] = field(default_factory=lambda: {TOKEN})
    drop_after: int = -1  # large files after which every connection is dropped; -1: never
    asked: list[str] = field(default_factory=list)

    def reset(self, kept: str) -> None:
        """Forget everything but one repository, and let every call succeed."""
        self.repositories = {kept: self.repositories[kept]}
        self.stored, self.uploads, self.asked, self.drop_after = {}, [], [], -1

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> None:
        """Put a repository there."""
        self.repositories[name] = Repository(private, files=dict(files))


def header_of(card: str) -> Any:
    """The header of a card, which the hub finds between two lines."""
    found = re.match(r"^\s*---[\r\n]+([\S\s]*?)[\r\n]+---(\r\n|\n|$)", card)
    return yaml.safe_load(found[1]) if found else None


class Handler(BaseHTTPRequestHandler):
    """The calls."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self, value: object = None, status: int = 200, body: bytes | None = None, **headers: str) -> None:
        """Send JSON, or a body."""
        data = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: str, status: int = 404) -> None:
        """Send an error of the hub's."""
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        """Read what was sent."""
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_all(self) -> None:
        """Find the call."""
        path, sent = unquote(urlsplit(self.path).path), self.body()
        self.hub.asked.append(f"{self.command} {path}")
        if 0 <= self.hub.drop_after <= len(self.hub.uploads):
            self.close_connection = True
            self.connection.close()
            return
        may_write = self.headers.get("Authorization", "").removeprefix("Bearer ") in self.hub.writers
        if (
            self.command in ("POST", "PUT")
            and not path.startswith(("/stored/", "/api/validate-yaml"))
            and not may_write
        ):
            self.refuse("Forbidden", 403)
        elif path == "/api/repos/create":
            self.create(json.loads(sent))
        elif path == "/api/validate-yaml":
            self.validate(json.loads(sent)["content"])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path):
            self.model(match[1], match[2] or "", sent, may_write)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(sent))
        elif match := re.fullmatch(r"/stored/(\w+)", path):
            assert hashlib.sha256(sent).hexdigest() == match[1]
            self.hub.stored[match[1]] = sent
            self.hub.uploads.append(match[1])
            self.answer({})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            self.file(match[1], match[3], may_write)
        else:
            self.refuse("EntryNotFound")

    do_GET = do_POST = do_PUT = do_PATCH = do_HEAD = handle_all  # noqa: N815 - the server's names

    def create(self, asked: dict[str, Any]) -> None:
        """Make a repository."""
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        known = name in self.hub.repositories
        if not known:
            private = asked.get("private", asked.get("visibility") == "private")
            self.hub.repositories[name] = Repository(bool(private), files={".gitattributes": b""})
        self.answer({"url": f"{self.hub.url}/{name}", "id": name}, 409 if known else 200)

    def validate(self, content: str) -> None:
        """Check a card's header as the hub does: YAML between two lines."""
        wrong = [] if isinstance(header_of(content), dict) else [{"message": "no header"}]
        self.answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def model(self, name: str, what: str, sent: bytes, known: bool) -> None:
        """All that is about one repository."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not known):
            self.refuse("RepoNotFound", 404 if known else 401)
        elif what == "" or what.startswith("revision/"):
            header = header_of(repository.files.get("README.md", b"").decode())
            self.answer({
                "_id": "1", "id": name, "modelId": name, "sha": repository.head, "private": repository.private,
                "gated": "auto" if repository.gated else False, "tags": [], "downloads": 0, "likes": 0,
                "cardData": header, "siblings": [{"rfilename": f} for f in repository.files],
            })  # fmt: skip
        elif what.startswith("tree/"):
            self.answer([
                {"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b, usedforsecurity=False).hexdigest()}
                for f, b in repository.files.items()
            ])  # fmt: skip
        elif what.startswith("preupload/"):
            self.answer({"files": [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in json.loads(sent)["files"]
            ]})  # fmt: skip
        elif what.startswith("commit/"):
            self.commit(name, repository, [json.loads(line) for line in sent.splitlines()])
        elif what == "settings":
            repository.private = json.loads(sent).get("visibility", "") == "private" or json.loads(sent).get(
                "private", False
            )
            self.answer({})
        else:
            self.refuse("EntryNotFound")

    def commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        """Change the files of a repository, all at once."""
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.files = files
        repository.commits.append(files)
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{repository.head}", "commitOid": repository.head})

    def batch(self, asked: dict[str, Any]) -> None:
        """Say where large files go, and which are there."""
        objects = [{"oid": o["oid"], "size": o["size"]} for o in asked["objects"]]
        for one in objects:
            if one["oid"] not in self.hub.stored:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/stored/{one['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def file(self, name: str, path: str, known: bool) -> None:
        """One file of a repository."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not known):
            self.refuse("RepoNotFound", 404 if known else 401)
        elif path not in repository.files:
            self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=repository.head)
        else:
            data = repository.files[path]
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self.answer(body=data, ETag=etag, X_Repo_Commit=repository.head, Content_Type="application/octet-stream")


@contextmanager
def served() -> Iterator[Hub]:
    """Run a hub while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, token: str = TOKEN) -> None:
    """Let this process use the hub, with a cache of its own.

    The client reads its environment when it is imported, which has happened.
    """
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
