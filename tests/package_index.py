"""A package index on loopback for wheels that the tests make: PEP 691 JSON with hashes, sizes and upload dates."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

MANIFEST = """
api = 1
[[components]]
kind = "smell_encoder"
name = "{name}"
factory = "{module}.parts:Nose"
summary = "Smells"
"""


def make_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    *,
    requires: Sequence[str] = (),
    plugin: bool = False,
    manifest: str | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a wheel into `folder` and return its path; a plugin has both entry points and a manifest."""
    module = name.replace("-", "_")
    content = {f"{module}/__init__.py": f"VERSION = {version!r}\n"} | dict(files or {})
    info = f"{module}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {one}\n" for one in requires)
    content[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: a fake\n{needs}"
    content[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    if plugin:
        content[f"{module}/mmhub.toml"] = (MANIFEST if manifest is None else manifest).format(name=name, module=module)
        content[f"{module}/parts.py"] = "class Nose:\n    class Config: pass\n"
        points = f"[mmhub.manifest]\n{name} = {module}:mmhub.toml\n[mmhub]\n{name} = {module}.parts\n"
        content[f"{info}/entry_points.txt"] = points
    content[f"{info}/RECORD"] = "".join(_row(path, text) for path, text in content.items()) + f"{info}/RECORD,,\n"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in content.items():
            archive.writestr(zipfile.ZipInfo(path, (2024, 1, 1, 0, 0, 0)), text)
    return wheel


def _row(path: str, text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    return f"{path},sha256={digest},{len(text.encode())}\n"


class PackageIndex:
    """Serve the files of a folder. `wheel` makes one; `forged`, `delays` and `dates` say how it is served."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.dates: dict[str, datetime] = {}  # file name: when it was uploaded; 30 days ago where nothing is said
        self.forged: dict[str, bytes] = {}  # file name: what is sent instead of it
        self.delays: dict[str, float] = {}  # file name: seconds before it is sent
        self.dated = self.hashed = True
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """The address of the simple index."""
        return f"http://127.0.0.1:{self._server.server_port}/simple/"

    def wheel(self, name: str, version: str = "1.0", *, days_old: float = 30, **content: Any) -> Path:
        """Make a wheel and serve it."""
        path = make_wheel(self.folder, name, version, **content)
        self.dates[path.name] = datetime.now(UTC) - timedelta(days=days_old)
        return path

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def page(self, project: str) -> dict[str, Any] | None:
        """The PEP 691 document of a project, None if there is none."""
        files = [self._entry(path) for path in sorted(self.folder.iterdir()) if _project(path.name) == project]
        versions = sorted({str(entry["filename"]).split("-")[1].removesuffix(".tar.gz") for entry in files})
        return (
            {"meta": {"api-version": "1.1"}, "name": project, "files": files, "versions": versions} if files else None
        )

    def _entry(self, path: Path) -> dict[str, Any]:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        address = f"{self.url.removesuffix('simple/')}files/{path.name}"
        hashes = {"sha256": digest} if self.hashed else {}
        entry: dict[str, Any] = {"filename": path.name, "url": address, "hashes": hashes}
        entry["size"] = path.stat().st_size
        if self.dated:
            date = self.dates.get(path.name, datetime.now(UTC) - timedelta(days=30))
            entry["upload-time"] = date.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return entry

    def send(self, path: str) -> tuple[int, str, bytes]:
        """Answer one request: status, media type, body."""
        self.requests.append(path)
        parts = unquote(path).strip("/").split("/")
        if parts[0] == "simple" and len(parts) == 2 and (page := self.page(parts[1])):
            return 200, "application/vnd.pypi.simple.v1+json", json.dumps(page).encode()
        file = self.folder / parts[-1]
        if parts[0] == "files" and file.is_file():
            time.sleep(self.delays.get(file.name, 0))
            return 200, "application/octet-stream", self.forged.get(file.name) or file.read_bytes()
        return 404, "text/plain", b"not found"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        index = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                status, kind, body = index.send(self.path)
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body if self.command == "GET" else b"")
                except OSError:  # whoever asked is gone
                    pass

            do_HEAD = do_GET

            def handle(self) -> None:
                with suppress(ConnectionError):  # whoever asked was killed
                    super().handle()

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def _project(file: str) -> str:
    return file.split("-")[0].replace("_", "-").lower()
