"""The parts of the Hugging Face hub that `hf download` asks for, on loopback, and its faults."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = 1000  # bytes; from here on a file is stored in LFS, as weights are


@dataclass
class Hub:
    """One repository at one revision; `cut` closes connections in the middle of large files."""

    repository: str
    revision: str
    files: dict[str, bytes]
    token: str = ""
    cut: bool = False
    lies: bool = False  # the content it sends is not what it says of it
    url: str = ""
    asked: list[str] = field(default_factory=list)  # "METHOD path", in order

    def info(self) -> dict[str, object]:
        entries = [self._entry(name, content) for name, content in self.files.items()]
        return {"id": self.repository, "sha": self.revision, "siblings": entries}

    def _entry(self, name: str, content: bytes) -> dict[str, object]:
        entry = {"rfilename": name, "size": len(content), "blobId": git_blob(content)}
        if len(content) >= LARGE:
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
        return entry

    def tree(self) -> list[dict[str, object]]:
        """The same as newer releases of `hf` ask for it."""
        found = []
        for name, content in self.files.items():
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(content)}
            entry["oid"] = git_blob(content)
            if len(content) >= LARGE:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            found.append(entry)
        return found

    def sent(self, name: str) -> list[str]:
        """The requests for a file's content."""
        return [line for line in self.asked if line.startswith("GET") and line.endswith("/" + name)]


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, answering at `hub.url` on a free loopback port."""

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.served, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        name = path.removeprefix(f"/{hub.repository}/resolve/{hub.revision}/")
        api, kind = f"/api/models/{hub.repository}", {"Content-Type": "application/json"}
        if hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
            self._send(401, b"{}", {})
        elif path == f"{api}/tree/{hub.revision}":
            self._send(200, json.dumps(hub.tree()).encode(), kind)
        elif path == f"{api}/revision/{hub.revision}":
            self._send(200, json.dumps(hub.info()).encode(), kind)
        elif name in hub.files:
            self._file(hub, hub.files[name])
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _file(self, hub: Hub, content: bytes) -> None:
        large = len(content) >= LARGE
        digest = hashlib.sha256(content).hexdigest() if large else git_blob(content)
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": hub.revision}
        if hub.lies:
            content = content[:-1] + b"!"
        self._send(200, content, headers, len(content) // 2 if hub.cut and large else None)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], stop: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stop])
        if stop is not None:
            self.close_connection = True
