"""A small hub on loopback: the part of its protocol that huggingface_hub and datasets speak to load what lies there.

Repositories are folders, one a revision. A private one answers whoever has its token, everybody else as the hub does:
401, as if it did not exist. `cut`: a file whose download always breaks off; `once`: one that breaks off one time.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repository:
    """revisions: branch or tag -> folder. token: of who may read it; None: everybody."""

    revisions: dict[str, Path]
    token: str | None = None

    def commit(self, revision: str) -> tuple[str, Path] | None:
        """(hash, folder) of a branch, a tag or a hash."""
        for name, folder in self.revisions.items():
            digest = hashlib.sha1(str(folder).encode()).hexdigest()
            if revision in (name, digest):
                return digest, folder
        return None


@dataclass
class Hub:
    """What is served, and what was asked for: (method, path, range) in order."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut: str | None = None
    once: str | None = None
    url: str = ""

    def downloads(self, name: str) -> list[str | None]:
        """Ranges of the downloads of a file, None for whole ones."""
        return [given for method, path, given in self.asked if method == "GET" and path.endswith(f"/{name}")]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *given: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        parts = path.split("/")
        if parts[0] == "api" and len(parts) >= 4 and parts[1] in ("models", "datasets"):
            kind, name, rest = parts[1], "/".join(parts[2:4]), parts[4:]
        elif parts[0] == "datasets" and len(parts) > 4:
            kind, name, rest = parts[0], "/".join(parts[1:3]), parts[3:]
        else:
            kind, name, rest = "models", "/".join(parts[:2]), parts[2:]
        repository = self.hub.repositories.get((kind, name))
        if repository is None or repository.token not in (None, self._token()):
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        what, revision, inside = (*rest[:2], "/".join(rest[2:])) if len(rest) > 1 else ("revision", "main", "")
        found = repository.commit(revision)
        if found is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, folder = found
        if what == "resolve":
            return self._file(folder / inside, commit)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if what == "tree":
            within = [file for file in files if not inside or file.relative_to(folder).is_relative_to(inside)]
            if inside and not within:
                return self._refuse(404, "EntryNotFound", "Entry not found")
            if "recursive=True" not in urlsplit(self.path).query.replace("true", "True"):
                start = folder / inside
                above = sorted({start / file.relative_to(start).parts[0] for file in within})
                found = [
                    {"type": "directory", "path": item.relative_to(folder).as_posix(), "oid": "0"}
                    for item in above
                    if item.is_dir()
                ]
                return self._json([*found, *(_entry(item, folder) for item in above if item.is_file())])
            return self._json([_entry(file, folder) for file in within])
        if what == "paths-info":
            text = body.decode()
            given = json.loads(text) if text.startswith("{") else parse_qs(text)
            wanted = given.get("paths", [])
            wanted = [wanted] if isinstance(wanted, str) else wanted
            return self._json([_entry(folder / item, folder) for item in wanted if (folder / item).is_file()])
        siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
        self._json({"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0})

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _refuse(self, code: int, kind: str, message: str) -> None:
        self._send(code, json.dumps({"error": message}).encode(), {"X-Error-Code": kind, "X-Error-Message": message})

    def _json(self, tree: Any) -> None:
        self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found")
        content = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        code, total = 200, len(content)
        given = self.headers.get("Range")
        if given is not None:
            first, _, last = given.removeprefix("bytes=").partition("-")
            start, end = int(first or 0), min(int(last or total - 1), total - 1)
            content, code = content[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{end}/{total}"
        if self.command == "GET" and path.name in (self.hub.cut, self.hub.once):
            self.hub.once = None if path.name == self.hub.once else self.hub.once
            self.send_response(code)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) * 9 // 10])
            self.wfile.flush()
            self.close_connection = True
            return None
        self._send(code, content, headers)


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    content = file.read_bytes()
    name = file.relative_to(folder).as_posix()
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.url` while it lasts."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
