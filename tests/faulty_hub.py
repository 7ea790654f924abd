"""A Hub of one repository that misbehaves on demand: the download tests count its bytes and break its answers."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = "team/model"
COMMIT = "c" * 40


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def folder_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class FaultyHub(ThreadingHTTPServer):
    """Serves `files` at COMMIT. `body` may change what a GET delivers; `fault` may answer a request in its own way."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.listing: list[dict[str, Any]] = []  # more entries for the tree
        self.body: Callable[[str, bytes], bytes] = lambda path, content: content
        self.fault: Callable[[_Handler, str], bool] = lambda request, path: False
        self.ranges = True
        self.pause = 0.0  # seconds between blocks of 64 KiB
        self.log: list[tuple[str, str, str]] = []  # method, path, Range
        self.sent = 0  # bytes of file content that left
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what the tests are about."""

    def hash_of(self, path: str) -> str:
        content = self.files[path]
        return hashlib.sha256(content).hexdigest() if path.endswith(".safetensors") else git_sha1(content)

    def entries(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for path, content in self.files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
            if path.endswith(".safetensors"):
                entry["lfs"] = {"oid": self.hash_of(path), "size": len(content), "pointerSize": 134}
            found.append(entry)
        return found + self.listing


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.log.append((self.command, path, self.headers.get("Range", "")))
        if self.server.fault(self, path):
            return
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        file = rest.partition("/")[2]
        if path.startswith(f"/api/models/{REPO}/tree/"):
            self.reply(200, json.dumps(self.server.entries()).encode(), {"Content-Type": "application/json"})
        elif repo != REPO:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif file not in self.server.files:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self._file(file)

    def _file(self, file: str) -> None:
        content = self.server.body(file, self.server.files[file])
        headers = {"ETag": f'"{self.server.hash_of(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if self.server.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if start >= len(content):
                status, content = 416, b""
        self.reply(status, memoryview(content)[start:], headers)

    def reply(self, status: int, content: bytes | memoryview, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for at in range(0, len(content), 2**16):
            block = content[at : at + 2**16]
            self.wfile.write(block)
            if status in (200, 206) and "/resolve/" in self.path:
                with self.server.lock:
                    self.server.sent += len(block)
            if self.server.pause:
                time.sleep(self.server.pause)
