"""A server that is stopped answers what it has accepted, and tells everybody else so cleanly."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from mmhub.errors import UsageError
from mmhub_serve.pool import Pool
from mmhub_serve.run import Server
from mmhub_serve.settings import Limits, Settings

from .conftest import Answer, Process, Running, Serving, read

REQUEST = b"GET /wait/0.01 HTTP/1.1\r\nHost: localhost\r\n\r\n"
SAMPLE = b'{"samples": [{"text": "a good film"}]}'
PREDICT = (
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(SAMPLE), SAMPLE)
)


def _extend(app: FastAPI) -> None:
    @app.get("/wait/{seconds}")
    async def wait(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "waited"

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            for number in range(6):
                yield f"{number} "
                await asyncio.sleep(0.07)

        return StreamingResponse(pieces())


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give clients that stay connected less time, so that the tests need less."""
    monkeypatch.setattr("mmhub_serve.run._QUIET", 0.25)


def _stop(running: Running) -> None:
    assert running.server is not None
    running.server.loop.call_soon_threadsafe(running.server.stop)


def _later(call: Callable[..., Any], *args: Any) -> Any:
    """Call in a thread; give it time to begin."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call, *args)
    pool.shutdown(wait=False)
    time.sleep(0.1)
    return future


def test_what_was_accepted_is_answered_and_readiness_ends_at_once(serve: Serving) -> None:
    with serve(_extend) as running:
        slow, stream = _later(running.ask, "GET", "/wait/0.4"), _later(running.ask, "GET", "/stream")
        with running.connect() as kept, running.connect() as waiting, running.connect() as reading:
            waiting.sendall(REQUEST.replace(b"0.01", b"0.4"))
            reading.sendall(REQUEST.replace(b"/wait/0.01", b"/stream"))
            kept.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert read(kept).status == 200 and reading.recv(1, socket.MSG_PEEK)
            _stop(running)
            time.sleep(0.1)
            kept.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            last = read(kept)
            assert last.status == 503 and "stopping" in last.error and last.headers["connection"] == "close"
            assert kept.recv(1) == b""
            assert read(waiting).headers["connection"] == "close"
            assert "connection" not in read(reading).headers  # it had begun
            reading.sendall(REQUEST)
            assert read(reading).status == 200
            with pytest.raises(ConnectionRefusedError):
                running.connect()
        assert slow.result().json == "waited"
        assert stream.result().body.endswith(b"5 \r\n0\r\n\r\n")


def test_connections_that_idle_do_not_hold_up_the_end(serve: Serving) -> None:
    with serve(_extend) as running, running.connect() as idle, running.connect() as silent:
        idle.sendall(REQUEST)
        assert read(idle).status == 200
        began = time.monotonic()
        _stop(running)
        assert idle.recv(1) == b"" and silent.recv(1) == b""
        assert time.monotonic() - began < 3


def test_a_head_that_has_begun_to_come_is_waited_for(serve: Serving) -> None:
    with serve(_extend) as running, running.connect() as sock:
        sock.sendall(REQUEST[:20])
        time.sleep(0.05)
        _stop(running)
        time.sleep(0.4)
        sock.sendall(REQUEST[20:])
        assert read(sock).status == 200


def test_a_second_stop_ends_what_is_left_with_503(serve: Serving) -> None:
    with serve(_extend) as running:
        slow = _later(running.ask, "GET", "/wait/30")
        began = time.monotonic()
        _stop(running)
        _stop(running)
        answer = slow.result()
        assert answer.status == 503 and "stopped" in answer.error and time.monotonic() - began < 3


def test_grace_is_the_longest_that_requests_are_waited_for(serve: Serving) -> None:
    with serve(_extend, grace=0.2, limits=Limits(answer_seconds=60)) as running:
        slow = _later(running.ask, "GET", "/wait/30")
        _stop(running)
        assert slow.result().status == 503


def test_a_load_that_nobody_waits_for_does_not_hold_up_the_end(
    toy: str, serve: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr("mmhub_serve.run._leave", left.append)
    monkeypatch.setattr(Server, "_signals", lambda server: nullcontext(True))
    with serve() as running:
        monkeypatch.setattr(Pool, "busy", True)
        _stop(running)
    assert left == [0]


def test_a_pool_is_busy_while_it_loads_also_when_who_asked_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()

    def fail(name: str, **options: Any) -> None:
        goes_on.wait(10)
        raise UsageError("no such model")

    async def check() -> None:
        pool = Pool(Settings(models=("m",)))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.use("m").__aenter__(), 0.02)
        assert pool.busy
        goes_on.set()
        while pool.busy:
            await asyncio.sleep(0.01)

    monkeypatch.setattr("mmhub.load", fail)
    asyncio.run(check())


# --- under load


def _keep_asking(running: Running, raw: bytes, keep: bool, seen: Counter[str], over: threading.Event) -> None:
    """Ask in a loop until the server cannot be reached; `seen` counts how each request ended."""
    sock: socket.socket | None = None
    while not over.is_set():
        first = sock is None
        try:
            sock = sock or running.connect()
        except OSError:
            seen["not accepted"] += 1
            return
        try:
            sock.sendall(raw)
            answer = read(sock)
        except OSError:
            answer = Answer()
        seen[_outcome(answer, first)] += 1
        if not keep or answer.headers.get("connection") == "close" or not answer.status:
            sock.close()
            sock = None


def _outcome(answer: Answer, first: bool) -> str:
    if answer.status == 200:
        whole = len(answer.body) == int(answer.headers["content-length"])
        return "answered" if whole else "cut"
    if answer.status:
        return f"status {answer.status}"
    return "closed at once" if first else "closed while idle"


def _besiege(running: Running, raw: bytes, stop: Callable[[], Any], seconds: float) -> Counter[str]:
    seen: Counter[str] = Counter()
    over = threading.Event()
    threads = [
        threading.Thread(target=_keep_asking, args=(running, raw, number % 2 == 0, seen, over)) for number in range(32)
    ]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop()
    for thread in threads:
        thread.join(20)
    over.set()
    assert not any(thread.is_alive() for thread in threads)
    return seen


def _check(seen: Counter[str]) -> None:
    assert seen["answered"] > 32
    assert seen["not accepted"] == 32  # each client ended so
    assert seen.keys() <= {"answered", "not accepted", "closed at once"}, seen
    assert seen["closed at once"] <= 2, seen  # connected, but never accepted: between the last look and the end


def test_under_load_every_accepted_request_is_answered(serve: Serving) -> None:
    with serve(_extend) as running:
        _check(_besiege(running, REQUEST, lambda: _stop(running), 0.3))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_under_load_loses_no_request(process: Callable[..., Process], number: int, code: int) -> None:
    child = process()
    child.at.wait()
    seen = _besiege(child.at, PREDICT, lambda: child.child.send_signal(number), 1.5)
    _check(seen)
    assert child.child.wait(20) == code
    assert child.child.stderr is not None
    assert "Traceback" not in child.child.stderr.read()


@pytest.mark.slow
def test_a_server_that_still_loads_is_alive_and_stops_at_a_signal(process: Callable[..., Process]) -> None:
    child = process()
    assert child.at.ask("GET", "/healthz").status == 200
    began = time.monotonic()
    assert child.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_a_second_signal_ends_at_once(process: Callable[..., Process]) -> None:
    child = process()
    child.at.wait()
    with child.at.connect() as sock:
        sock.sendall(PREDICT[:-5])
        time.sleep(0.3)
        child.child.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert child.child.poll() is None
        began = time.monotonic()
        assert child.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < 3


@pytest.mark.slow
def test_keys_and_notes_of_the_command(process: Callable[..., Process]) -> None:
    child = process("--access-log", MMHUB_SERVE_KEYS="0123456789abcdef")
    assert child.at.predict("a").status == 401
    assert child.at.wait().predict("a", Authorization="Bearer 0123456789abcdef").status == 200
    assert child.stop(signal.SIGTERM) == 0
    assert child.child.stderr is not None
    said = child.child.stderr.read()
    assert child.at.url in said and "whoever has one of 1 keys" in said and " POST /predict 200 " in said
    assert "0123456789abcdef" not in said
