"""What the benchmarks of `mmhub serve` share: a server in a process of its own, and clients that cost it little.

As a script it is those clients, so that their time is not the server's:

    python benchmarks/serve_client.py PORT CLIENTS SECONDS < requests.jsonl > result.json

Each client keeps one connection and asks again as soon as it is answered, requests in turn from the same list. One more
connection asks for /healthz every 50 ms: how long that takes is how long the server's event loop is busy elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import resource
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Connection(asyncio.Protocol):
    """One keep-alive connection: `ask` sends a request and returns the status and body of its answer."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._need = -1  # bytes of head and body, once the head is known
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def send(self, request: bytes) -> None:
        """Send a request whose answer nobody waits for."""
        self._transport.write(request)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._need < 0 and (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end]).lower()
            _, told, rest = head.partition(b"content-length:")
            if told:
                self._need = end + 4 + int(rest.split(b"\r\n", 1)[0])
            elif self._buffer.endswith(b"\r\n0\r\n\r\n"):  # a stream, in chunks
                self._need = len(self._buffer)
        if 0 <= self._need <= len(self._buffer) and self._answer is not None:
            whole = bytes(self._buffer[: self._need])
            self._buffer, self._need = self._buffer[self._need :], -1
            self._answer.set_result((int(whole[9:12]), whole.partition(b"\r\n\r\n")[2]))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("the server closed the connection"))

    def close(self) -> None:
        self._transport.close()


def request(path: str, body: Any = None) -> bytes:
    """Return the bytes of a request: POST of a body in JSON, GET without one."""
    content = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def drive(port: int, clients: int, seconds: float, asked: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Let clients ask for so long; -> latencies and statuses, and every distinct answer to each request."""
    loop = asyncio.get_running_loop()
    requests = [request(path, body) for path, body in asked]
    seconds_of: list[float] = []
    lags: list[float] = []
    statuses: dict[int, int] = {}
    answers: list[set[bytes]] = [set() for _ in requests]
    connections = [(await loop.create_connection(Connection, "127.0.0.1", port))[1] for _ in range(clients + 1)]
    until = time.perf_counter() + seconds
    turn = iter(range(10**12))

    async def client(connection: Connection) -> None:
        while (began := time.perf_counter()) < until:
            number = next(turn) % len(requests)
            status, body = await connection.ask(requests[number])
            seconds_of.append(time.perf_counter() - began)
            statuses[status] = statuses.get(status, 0) + 1
            if status == 200:
                answers[number].add(body)

    async def probe(connection: Connection) -> None:
        health = request("/healthz")
        while (began := time.perf_counter()) < until:
            await connection.ask(health)
            lags.append(time.perf_counter() - began)
            await asyncio.sleep(0.05)

    began = time.perf_counter()
    await asyncio.gather(probe(connections[-1]), *map(client, connections[:-1]))
    took = time.perf_counter() - began
    for connection in connections:
        connection.close()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "requests": len(seconds_of),
        "seconds": took,
        "rate": len(seconds_of) / took,
        "ms": {name: 1e3 * share(seconds_of, part) for name, part in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))},
        "loop_ms": {name: 1e3 * share(lags, part) for name, part in (("p50", 0.5), ("p99", 0.99))},
        "statuses": statuses,
        "answers": [[body.decode() for body in found] for found in answers],
        "client_cpu": used.ru_utime + used.ru_stime,
    }


def share(values: Iterable[float], part: float) -> float:
    """Return the value that this part of them does not exceed."""
    found = sorted(values)
    return found[min(len(found) - 1, int(part * len(found)))]


def run_clients(port: int, clients: int, seconds: float, asked: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Run `drive` in a process of its own."""
    command = [sys.executable, __file__, str(port), str(clients), str(seconds)]
    found = subprocess.run(command, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(found.stdout)
    return result


class Server:
    """A running `mmhub serve`: its port, and what it uses."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def cpu(self) -> float:
        """CPU seconds so far."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Resident memory, MB."""
        line = next(line for line in self._proc("status").splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    def files(self) -> int:
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()


@contextmanager
def serving(*arguments: object, patience: float = 120) -> Iterator[Server]:
    """Run `mmhub serve ARGUMENTS` on a free port until it is ready, and stop it at the end."""
    command = [sys.executable, "-m", "mmhub", "serve", *map(str, arguments), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        server = Server(process, int(json.loads(line)["url"].rpartition(":")[2]))
        _wait(server, patience)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def _wait(server: Server, patience: float) -> None:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit("the server did not become ready")


def about(names: Sequence[str]) -> list[str]:
    """The lines that say when, where, on what and with which versions something was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    models = [line for line in _cpu_info() if line.startswith("model name")]
    model = models[0].partition(":")[2].strip() if models else platform.processor()
    threads, load = os.environ.get("OMP_NUM_THREADS", "default"), os.getloadavg()[0]
    machine = f"{os.cpu_count()} cores of {model}, OMP_NUM_THREADS={threads}; load {load:.1f} at the start"
    return [
        f"- date: {datetime.now(UTC):%Y-%m-%d}; commit: {commit.strip()}",
        f"- command: `python {' '.join(map(_plain, sys.argv))}`",
        f"- machine: {machine}; Python {platform.python_version()}",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in names)}",
    ]


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _plain(argument: str) -> str:
    """An argument without folders of this machine."""
    return Path(argument).name if argument.startswith("/") else argument


if __name__ == "__main__":
    port, clients, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    json.dump(asyncio.run(drive(port, clients, seconds, json.load(sys.stdin))), sys.stdout)
