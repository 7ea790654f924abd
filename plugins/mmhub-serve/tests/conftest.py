"""Servers to attack and to stop: in a thread on a real socket, or as `mmhub serve` in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from mmhub_serve.app import build_app
from mmhub_serve.run import Server, listen, tls_of
from mmhub_serve.settings import Limits, Settings
from tests.conftest import _one_thread, _own_caches, cli  # noqa: F401

Extend = Callable[[FastAPI], None]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an untrained classifier of texts, as a name for `mmhub serve`."""
    from mmhub.build import compose

    model = compose(
        encoders={"text": {"use": "lstm", "config": {"dim": 8, "embedding_dim": 8}}},
        decoder={"use": "classification", "config": {"labels": ["bad", "good"]}},
        texts=["a good film", "a bad one"],
    ).eval()
    folder = tmp_path_factory.mktemp("toy") / "model"
    model.save(folder)
    return str(folder)


@dataclass
class Answer:
    """What came back: nothing (status 0) where the connection was closed or reset instead."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message, of an answer that has the form of all errors."""
        assert self.headers["content-type"] == "application/json", self
        assert self.json.keys() == {"error"} and self.json["error"].keys() == {"message", "type", "code", "param"}
        message = self.json["error"]["message"]
        assert "\n" not in message and "Traceback" not in message and ".py" not in message
        return str(message)


@dataclass
class Running:
    """A server and how to talk to it, as politely or not as a test wants."""

    host: str
    port: int
    server: Server | None = None
    app: FastAPI | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def connect(self, timeout: float = 10) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout)

    def send(self, raw: bytes, *, half_close: bool = False) -> Answer:
        """Send bytes and read one answer; the connection is the request's own."""
        with self.connect() as sock:
            with contextlib.suppress(OSError):
                sock.sendall(raw)
                if half_close:
                    sock.shutdown(socket.SHUT_WR)
            return read(sock)

    def ask(self, method: str, path: str, body: bytes | Any = b"", **headers: str) -> Answer:
        """Send a request as a browser or a program would; a body that is no bytes goes as JSON."""
        given = {"Host": f"{self.host}:{self.port}", "Connection": "close"}
        if not isinstance(body, bytes):
            body, given["Content-Type"] = json.dumps(body).encode(), "application/json"
        if body or method == "POST":
            given["Content-Length"] = str(len(body))
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value)
        return self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)

    def predict(self, *texts: str, **headers: str) -> Answer:
        return self.ask("POST", "/predict", {"samples": [{"text": text} for text in texts]}, **headers)

    def wait(self, seconds: float = 60) -> Running:
        """Return once the first model is loaded."""
        until = time.monotonic() + seconds
        while self.ask("GET", "/readyz").status != 200:
            assert time.monotonic() < until, "the server did not become ready"
            time.sleep(0.01)
        return self


def read(sock: socket.socket) -> Answer:
    """Read one answer, past any 100 Continue, to its end or that of the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while True:
            head, blank, rest = data.partition(b"\r\n\r\n")
            if blank and head.split(b" ")[1] == b"100":
                data = rest
                continue
            if blank and _whole(head, rest):
                break
            part = sock.recv(65536)
            if not part:
                break
            data += part
    head, _, rest = data.partition(b"\r\n\r\n")
    if not head:
        return Answer()
    lines = head.decode("latin-1").split("\r\n")
    pairs = [line.partition(":") for line in lines[1:]]
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    return Answer(int(lines[0].split(" ")[1]), headers, rest)


def _whole(head: bytes, body: bytes) -> bool:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.split(b":")[1])
        if line.startswith(b"transfer-encoding:"):
            return body.endswith(b"0\r\n\r\n")
    return head.split(b" ")[1] in (b"204", b"304")


Serving = Callable[..., Any]


@contextmanager
def serving(
    toy: str, extend: Extend | None = None, *, limits: Limits | None = None, **settings: Any
) -> Iterator[Running]:
    """Run the application in a thread on a free port; `extend` adds routes to it."""
    app = build_app(Settings(models=(toy,), limits=limits or Limits(), **settings))
    if extend is not None:
        extend(app)
    listener = listen("127.0.0.1", 0)
    server = Server(app, listener, tls_of(app.state.settings))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    running = Running("127.0.0.1", listener.getsockname()[1], server, app)
    try:
        yield running if settings.keys() & {"keys", "certificate"} else running.wait()
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            for _ in range(2):  # at once
                server.loop.call_soon_threadsafe(server.stop)
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture
def serve(toy: str) -> Serving:
    """`with serve(extend, limits=..., **settings) as running:` runs the application in a thread."""

    def start(extend: Extend | None = None, **settings: Any) -> Any:
        return serving(toy, extend, **settings)

    return start


@dataclass
class Process:
    """`mmhub serve` in a process of its own."""

    child: subprocess.Popen[str]
    at: Running

    def stop(self, number: int, seconds: float = 30) -> int:
        """Send a signal and return the exit code."""
        self.child.send_signal(number)
        return self.child.wait(seconds)


@pytest.fixture
def process(toy: str, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """`process(*options)` starts `mmhub serve` and returns once it listens."""
    children: list[subprocess.Popen[str]] = []

    def start(*options: str, name: str = toy, **environment: str) -> Process:
        command = [sys.executable, "-m", "mmhub", "serve", name, "--port", "0", "--json", *options]
        child = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        children.append(child)
        assert child.stdout is not None and child.stderr is not None
        found, _, _ = select.select([child.stdout], [], [], 60)
        line = child.stdout.readline() if found else ""
        assert line, child.stderr.read() if child.poll() is not None else "no address within a minute"
        host, _, port = json.loads(line)["url"].removeprefix("http://").rpartition(":")
        return Process(child, Running(host, int(port)))

    yield start
    for child in children:
        child.kill()
        child.communicate()
