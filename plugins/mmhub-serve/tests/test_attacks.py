"""Strangers on a socket: whatever they send or not, they are told 4xx in time, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from starlette.requests import Request

from mmhub_serve.bodies import _decoded
from mmhub_serve.errors import Refused
from mmhub_serve.protocol import Connection
from mmhub_serve.settings import Limits

from .conftest import Answer, Process, Running, Serving, read, serving

LIMITS = Limits(
    body=100_000,
    bodies=300_000,
    head_seconds=0.25,
    body_seconds=0.5,
    read_seconds=0.25,
    idle_seconds=0.3,
    connections=40,
)
CRLF = "\r\n"
BIG = 20_000_000


ENDED: list[str] = []  # what the application saw of clients that went


def _extend(app: FastAPI) -> None:
    @app.get("/big")
    async def big() -> Response:
        return Response(b"x" * BIG)

    @app.get("/pieces")
    async def pieces() -> StreamingResponse:
        async def endless() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x" * 65_536
            finally:
                ENDED.append("stream")

        return StreamingResponse(endless())

    @app.get("/wait/{seconds}")
    async def wait(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            ENDED.append("cancelled")
            raise
        return "waited"

    @app.post("/read")
    async def read_body(request: Request) -> int:
        try:
            return len(await request.body())
        except BaseException:
            ENDED.append("gone")
            raise


@pytest.fixture(scope="module")
def running(toy: str) -> Iterator[Running]:
    with serving(toy, _extend, limits=LIMITS) as found:
        yield found


@pytest.fixture(autouse=True)
def _others_are_served_and_nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each attack another client gets its answer, and soon no connection of the attack is left."""
    ENDED.clear()
    if "running" not in request.fixturenames:
        yield
        return
    running: Running = request.getfixturevalue("running")
    yield
    assert running.predict("a good film").status == 200
    assert running.server is not None
    _until(lambda: not running.server._state.connections, "connections are left")  # type: ignore[union-attr]
    assert running.server._rules.bodies == 0


def _until(done: Any, words: str, seconds: float = 5) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, words
        time.sleep(0.01)


def _head(*lines: str, method: str = "POST", path: str = "/predict", host: str = "localhost") -> bytes:
    return CRLF.join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode("latin-1")


JSON = "Content-Type: application/json"


# --- requests that are malformed or too large


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n", 400),  # TLS
        (b"\0" * 2000, 400),
        (b"GET /\r\n\r\n", 400),  # HTTP/0.9
        (b"GET /healthz HTTP/2.0\r\nHost: localhost\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: local host\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", 400),
        (b"GET http://localhost/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),  # absolute form
        (b"CONNECT localhost:22 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (_head(method="GET", path="/%00"), 404),
        (_head(method="GET", path="/%ff%fe%c0%af"), 404),
        (_head(method="GET", path="/../../etc/passwd"), 404),
        (_head(method="GET", path="/%2e%2e/%2e%2e/etc/passwd"), 404),
        (_head(method="GET", path="/" + "a" * 9000), 414),
        (b"GET /" + b"a" * 1_000_000, 414),
        (_head("X: " + "a" * 40_000), 431),
        (_head(*["X: y"] * 10_000), 431),
        (_head(*["X: y"] * 101), 431),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 1_000_000, 431),
    ],
)
def test_malformed_and_oversized_heads_are_refused(running: Running, raw: bytes, status: int) -> None:
    answer = running.send(raw)
    assert answer.status == status and answer.error
    if status != 404:
        assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 5, 6"],
        ["Content-Length: +5"],
        ["Content-Length: -1"],
        ["Content-Length: 0x5"],
        ["Content-Length: " + "9" * 40],
        ["Transfer-Encoding: chunked, chunked"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: identity"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding : chunked"],
    ],
)
def test_requests_whose_end_is_in_doubt_are_refused_and_what_follows_is_no_request(
    running: Running, lines: list[str]
) -> None:
    smuggled = b"0\r\n\r\n" + _head(method="GET", path="/wait/0")
    answer = running.send(_head(JSON, *lines) + smuggled)
    assert answer.status == 400 and answer.headers["connection"] == "close"
    assert b"waited" not in answer.body


@pytest.mark.parametrize(
    "chunk", [b"5;" + b"x" * 50_000, b"zz\r\n", b"-1\r\n", b"5\r\nabcdefgh\r\n", b"F" * 30 + b"\r\n"]
)
def test_malformed_chunks_are_refused(running: Running, chunk: bytes) -> None:
    assert running.send(_head(JSON, "Transfer-Encoding: chunked") + chunk).status in (400, 431)


def test_a_body_in_thousands_of_tiny_chunks_is_refused(running: Running) -> None:
    raw = _head(JSON, "Transfer-Encoding: chunked") + b"1\r\na\r\n" * 20_000
    assert "chunks" in running.send(raw).error


def test_a_body_of_3_gigabytes_is_refused_before_it_is_sent(running: Running) -> None:
    with running.connect() as sock:
        sock.sendall(_head(JSON, "Content-Length: 3000000000", "Expect: 100-continue"))
        began = time.monotonic()
        answer = read(sock)
    assert answer.status == 413 and "100000 bytes" in answer.error and time.monotonic() - began < 1


@pytest.mark.slow
def test_a_client_that_sends_on_after_its_413_can_read_why(running: Running) -> None:
    with running.connect() as sock:
        sock.sendall(_head(JSON, "Content-Length: 3000000000"))
        with contextlib.suppress(OSError):
            for _ in range(100):
                sock.sendall(b"x" * 65_536)
        assert read(sock).status == 413


def test_a_body_in_chunks_is_refused_where_it_becomes_too_large(running: Running) -> None:
    chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    assert running.send(_head(JSON, "Transfer-Encoding: chunked", path="/read") + chunk * 5).status == 413


def test_all_bodies_together_are_bounded(running: Running) -> None:
    with ExitStack() as stack:
        socks = [stack.enter_context(running.connect()) for _ in range(4)]
        for sock in socks:
            sock.sendall(_head(JSON, "Content-Length: 90000", path="/read") + b"x" * 89_000)
        statuses = sorted(read(sock).status for sock in socks)
    assert statuses == [408, 408, 408, 503]


# --- bodies


def _body(text: str | bytes, kind: str = "application/json") -> dict[str, Any]:
    return {"body": text if isinstance(text, bytes) else text.encode(), "Content_Type": kind}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "[" * 10_000,
        '{"samples": ' + "[" * 10_000 + "]" * 10_000 + "}",
        '{"samples": [{"text": ' + '{"a":' * 5_000 + "1" + "}" * 5_000 + "}]}",
        '{"samples": [{"text": NaN}]}',
        '{"samples": [{"text": Infinity}]}',
        '{"samples": [{"text": 1e999}]}',
        '{"samples": [{"text": ' + "9" * 5_000 + "}]}",
        '{"samples": [{"text": "a", "text": 5}]}',
        '{"samples": [{"text": "\\ud800"}]}',
        '{"samples": []}',
        '{"samples": {}}',
        '{"samples": [[]]}',
        '{"samples": [{}]}',
        '{"samples": [{"text": {"base64": "!"}}]}',
        '{"samples": [{"nope": "a"}]}',
        '{"samples": [{"text": "a"}], "nope": 1}',
        '{"model": 5, "samples": [{"text": "a"}]}',
        b'{"samples": [{"text": "\xff\xfe"}]}',
        "\ufeff{}",
        '{"samples": [{"text": "a"}]} more',
        "{'samples': []}",
    ],
    ids=lambda text: ascii(text)[:30],
)
def test_bodies_of_the_wrong_shape_are_refused(running: Running, text: str | bytes) -> None:
    answer = running.ask("POST", "/predict", **_body(text))
    assert answer.status == 400 and answer.error


def test_an_unknown_model_is_not_found(running: Running) -> None:
    answer = running.ask("POST", "/predict", {"model": "../../etc", "samples": [{"text": "a"}]})
    assert answer.status == 404 and answer.json["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("kind", "encoding", "status"),
    [
        ("text/plain", "", 415),
        ("application/x-www-form-urlencoded", "", 415),
        ("application/xml", "", 415),
        ("", "", 415),
        ("application/json", "gzip", 415),
        ("application/json", "deflate, br", 415),
        ("multipart/form-data", "", 400),
        ("multipart/form-data; boundary=", "", 400),
        ("multipart/form-data; boundary=x", "", 400),
    ],
)
def test_bodies_of_other_kinds_are_refused(running: Running, kind: str, encoding: str, status: int) -> None:
    answer = running.ask(
        "POST", "/predict", b'{"samples": [{"text": "a"}]}', Content_Type=kind, Content_Encoding=encoding
    )
    assert answer.status == status and answer.error


def test_forms_with_too_many_parts_are_refused(running: Running) -> None:
    part = '--x\r\nContent-Disposition: form-data; name="text"\r\n\r\na\r\n'
    answer = running.ask("POST", "/predict", **_body(part * 1_700 + "--x--\r\n", "multipart/form-data; boundary=x"))
    assert answer.status == 400 and answer.error


def test_a_body_of_very_many_objects_is_refused_before_they_are_made() -> None:
    with pytest.raises(Refused, match="too many") as caught:
        _decoded(b'{"samples": [' + b'{"":0},' * 300_000 + b"{}]}")
    assert caught.value.status == 413


def test_forms_are_never_written_to_a_disk(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", full)
    monkeypatch.setattr("starlette.formparsers.MultiPartParser.spool_max_size", 1_000)
    part = '--x\r\nContent-Disposition: form-data; name="text"; filename="text"\r\n\r\n' + "a " * 5_000
    answer = running.ask("POST", "/predict", **_body(part + "\r\n--x--\r\n", "multipart/form-data; boundary=x"))
    assert answer.status == 200, answer


def test_what_is_answered_before_its_body_came_holds_no_memory_and_no_connection(running: Running) -> None:
    with ExitStack() as stack:
        for _ in range(LIMITS.connections + 5):
            sock = stack.enter_context(running.connect())
            sock.sendall(_head(JSON, "Content-Length: 95000", path="/nope") + b"x" * 30_000)
            answer = read(sock)
            assert answer.status == 404 and answer.headers["connection"] == "close"
            sock.sendall(b"x" * 60_000)
        assert running.server is not None
        _until(lambda: running.server._rules.bodies == 0, "bodies are held", 0.5)  # type: ignore[union-attr]
        assert running.predict("a good film " * 1_000).status == 200


def test_a_line_break_after_a_body_is_passed_over(running: Running) -> None:
    body = b'{"samples": [{"text": "a"}]}'
    with running.connect() as sock:
        for _ in range(2):
            sock.sendall(_head(JSON, f"Content-Length: {len(body)}") + body + b"\r\n")
            assert read(sock).status == 200


def test_what_follows_a_head_request_is_refused_with_a_body(running: Running) -> None:
    with running.connect() as sock:
        sock.sendall(_head(method="HEAD", path="/healthz"))
        time.sleep(0.05)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        sock.sendall(b"\0 nonsense\r\n\r\n")
        answer = read(sock)
    assert answer.status == 400 and answer.error


def test_a_failure_at_one_connection_ends_that_one_only(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(connection: Connection, now: float) -> None:
        raise ZeroDivisionError

    with running.connect() as sock, monkeypatch.context() as patch:
        patch.setattr(Connection, "check", fail)
        with contextlib.suppress(ConnectionError):
            assert sock.recv(1) == b""
    assert "a connection failed" in caplog.text


# --- clients that are slow, or go


def test_headers_that_never_end_are_408_and_others_are_served_meanwhile(running: Running) -> None:
    with _slow(running, 30, b"GET / HTTP/1.1\r\nX: ") as answers:
        assert running.predict("a good film").status == 200
    assert [answer.status for answer in answers] == [408] * 30


def test_bodies_that_crawl_are_408_and_others_are_served_meanwhile(running: Running) -> None:
    with _slow(running, 30, _head(JSON, "Content-Length: 1000")) as answers:
        assert running.predict("a good film").status == 200
    assert [answer.status for answer in answers] == [408] * 30


@contextmanager
def _slow(running: Running, number: int, begin: bytes) -> Iterator[list[Answer]]:
    """Connections that send a byte every 50 ms until they are answered."""
    answers: list[Answer] = []
    with ExitStack() as stack:
        socks = [stack.enter_context(running.connect()) for _ in range(number)]
        for sock in socks:
            sock.sendall(begin)
        yield answers
        until = time.monotonic() + 5
        while len(answers) < number and time.monotonic() < until:
            for sock in list(socks):
                if select.select([sock], [], [], 0)[0]:
                    socks.remove(sock)
                    answers.append(read(sock))
                else:
                    with contextlib.suppress(OSError):
                        sock.sendall(b"x")
            time.sleep(0.05)


def test_a_body_that_comes_steadily_has_more_time(serve: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmhub_serve.protocol._RATE", 10)
    body = b'{"samples": [{"text": "a"}]}'
    with serve(limits=Limits(body_seconds=0.05)) as running, running.connect() as sock:
        sock.sendall(_head(JSON, f"Content-Length: {len(body)}") + body[:-1])
        time.sleep(0.3)
        sock.sendall(body[-1:])
        assert read(sock).status == 200


def test_connections_that_say_nothing_are_closed(running: Running) -> None:
    with running.connect() as sock:
        assert read(sock) == Answer()


def test_idle_connections_are_closed_after_their_time(running: Running) -> None:
    with running.connect() as sock:
        sock.sendall(_head(method="GET", path="/healthz"))
        assert read(sock).status == 200
        began = time.monotonic()
        assert sock.recv(1) == b""
        assert 0.1 < time.monotonic() - began < 3


@pytest.mark.parametrize("path", [pytest.param("/big", marks=pytest.mark.slow), "/pieces"])
def test_a_client_that_does_not_read_loses_its_connection(running: Running, path: str) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((running.host, running.port))
        sock.sendall(_head(method="GET", path=path))
        assert running.server is not None
        _until(lambda: running.server._state.connections, "it is not accepted")  # type: ignore[union-attr]
        _until(lambda: not running.server._state.connections, "it is held")  # type: ignore[union-attr]
        sock.settimeout(5)
        got = 0
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(1 << 20):
                got += len(part)
    assert got < BIG
    gc.collect()
    _until(lambda: path == "/big" or ENDED, "the stream goes on")


def test_what_a_client_asked_is_stopped_when_it_goes(running: Running) -> None:
    with running.connect() as sock:
        sock.sendall(_head(method="GET", path="/wait/30"))
        time.sleep(0.05)
    _until(lambda: ENDED == ["cancelled"], "it goes on")


def test_a_body_that_breaks_off_reaches_nobody(running: Running) -> None:
    for half_close in (True, False):
        with running.connect() as sock:
            sock.sendall(_head(JSON, "Content-Length: 1000", path="/read") + b"x")
            time.sleep(0.02)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
                assert read(sock).status == 400
    _until(lambda: len(ENDED) == 2, "the application still waits")


def test_a_client_that_closed_its_half_gets_its_answer(running: Running) -> None:
    assert running.send(_head(method="GET", path="/wait/0.3"), half_close=True).body == b'"waited"'


def test_half_a_head_is_400(running: Running) -> None:
    assert running.send(b"GET /healthz HT", half_close=True).status == 400


def test_requests_in_a_row_are_answered_in_order(running: Running) -> None:
    first, second = _head(method="GET", path="/wait/0.05"), _head("Connection: close", method="GET", path="/healthz")
    with running.connect() as sock:
        sock.sendall(first + second)
        data = b""
        while part := sock.recv(65536):
            data += part
    assert data.count(b"HTTP/1.1 200") == 2 and data.index(b'"waited"') < data.index(b'{"status":"ok"}')


@pytest.mark.slow
def test_requests_in_a_row_are_not_hoarded(running: Running) -> None:
    """While one is answered, what follows it stays with the client."""
    with running.connect() as sock:
        sock.settimeout(0.3)
        sock.sendall(_head(method="GET", path="/wait/1"))
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 200_000_000:
                sent += sock.send(_head(method="GET", path="/healthz") * 1000)
    assert sent < 50_000_000


def test_head_gets_no_body_and_an_upgrade_is_passed_over(running: Running) -> None:
    assert running.ask("HEAD", "/nope", b"").body == b""
    assert running.ask("GET", "/healthz", Connection="upgrade, close", Upgrade="websocket").status == 200


# --- very many


def test_the_oldest_idle_connection_makes_room(running: Running) -> None:
    with ExitStack() as stack:
        socks = [stack.enter_context(running.connect()) for _ in range(LIMITS.connections)]
        socks[0].sendall(b"GET /healthz HT")
        time.sleep(0.05)
        assert running.ask("GET", "/healthz").status == 200
        gone = select.select(socks, [], [], 0.2)[0]
        assert len(gone) == 1 and gone[0].recv(1) == b"" and gone[0] is not socks[0]


def test_where_all_connections_are_busy_another_is_503(running: Running) -> None:
    with ExitStack() as stack:
        socks = [stack.enter_context(running.connect()) for _ in range(LIMITS.connections)]
        for sock in socks:
            sock.sendall(_head(method="GET", path="/wait/0.4"))
        time.sleep(0.1)
        answer = running.ask("GET", "/healthz")
        assert answer.status == 503 and "busy" in answer.error and "retry-after" in answer.headers
        assert {read(sock).status for sock in socks} == {200}


@pytest.mark.slow
def test_memory_and_files_are_back_after_a_siege(process: Any) -> None:
    """Real limits, a process of its own: 150 slow clients, gigabytes, resets and garbage, and others who are served."""
    child: Process = process("--max-body", "8")
    at = child.at.wait()
    for _ in range(200):
        at.predict("a good film")
    files, memory = _files(child), _memory(child)
    times: list[float] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            began = time.monotonic()
            assert at.predict("a good film").status == 200
            times.append(time.monotonic() - began)

    with ThreadPoolExecutor(2) as pool, ExitStack() as stack:
        stack.callback(over.set)
        others = [pool.submit(ask) for _ in range(2)]
        slow = [stack.enter_context(at.connect(60)) for _ in range(150)]
        for number, sock in enumerate(slow):
            sock.sendall(b"GET / HTTP/1.1\r\nX: " if number % 2 else _head(JSON, "Content-Length: 100000"))
        for _ in range(12):
            for sock in slow:
                with contextlib.suppress(OSError):
                    sock.sendall(b"x")
            assert at.send(_head(*["X: y"] * 10_000)).status == 431
            assert at.send(b"GET / HTTP/1.1\r\nX: " + b"a" * 1_000_000).status == 431
            assert at.send(_head(JSON, "Content-Length: 3000000000") + b"x" * 20_000_000).status == 413
            assert at.send(os.urandom(100_000)).status in (400, 414, 431)
            with at.connect() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.sendall(_head(JSON, "Content-Length: 5000000") + b"x" * 4_000_000)
            time.sleep(0.5)
        statuses = {read(sock).status for sock in slow}
        over.set()
        for other in others:
            other.result()
    assert statuses == {408}
    assert len(times) > 50 and sorted(times)[len(times) // 2] < 1
    _until(lambda: _files(child) <= files + 2, "files are left open", 20)
    assert _memory(child) - memory < 60_000_000
    assert child.stop(15) == 0


def _files(child: Process) -> int:
    return len(list(Path(f"/proc/{child.child.pid}/fd").iterdir()))


def _memory(child: Process) -> int:
    gc.collect()
    for line in Path(f"/proc/{child.child.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.slow
def test_a_form_with_ten_thousand_parts_is_refused(serve: Serving) -> None:
    part = '--x\r\nContent-Disposition: form-data; name="text"\r\n\r\na\r\n'
    with serve() as running:
        answer = running.ask(
            "POST", "/predict", **_body(part * 10_000 + "--x--\r\n", "multipart/form-data; boundary=x")
        )
    assert answer.status == 400 and answer.error
