"""The hub as a running server: sockets, limits and shutdown. What a path means is left to `routes`.

A client never sees a stack trace and never waits on a stuck connection: every read and write has a time limit, and an
unexpected error is logged here and answered with a bare 500.
"""

import errno
import io
import logging
import re
import secrets
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from mmhub_hubserver import web
from mmhub_hubserver.accounts import Accounts
from mmhub_hubserver.address import Address
from mmhub_hubserver.errors import HubError, Invalid, StorageFailed
from mmhub_hubserver.pace import PacedReader
from mmhub_hubserver.routes import Routes
from mmhub_hubserver.store import Store
from mmhub_hubserver.tls import Certificate
from mmhub_hubserver.wire import Body, Request, Response, form

SOCKET_SECONDS = 30  # for the head of a request, for its body to begin, and for each piece of a response
MAX_CONNECTIONS = 256  # each is a thread and up to three open files
_DRAIN_LIMIT = 64 << 20  # bytes of a refused upload that are read so that the client sees the refusal
_PIECE = 1 << 16  # bytes written at once, each with its own time limit
_REQUEST_ID = re.compile(r"[A-Za-z0-9._=;:\-]{1,128}")
_SAFE = {  # on every answer: content that users uploaded must not act in a browser, whatever it is
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Referrer-Policy": "same-origin",
}
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_log = logging.getLogger("mmhub_hubserver")
_access_log = logging.getLogger("mmhub_hubserver.access")  # one line a request at level INFO, never with a secret


class HubServer:
    """A hub over one data folder, on loopback unless it has accounts, and TLS or a proxy in front.

    As a context manager it serves from a background thread:

        with HubServer(folder) as hub:
            HfApi(endpoint=hub.url, token=False).create_repo("org/model")

    Args:
        port: 0 takes a free port.
        certificate: speak TLS with it.
        behind_proxy: a proxy that adds TLS is in front; believe its `X-Forwarded-Proto`.
        public_url: what clients call this hub, if not what they say in `Host`.
        store_options: passed on to `Store`, such as `quota` in bytes.

    Raises:
        ValueError: this address needs accounts or TLS.
        OSError: the port is taken.
        StoreUnusable: another server holds the data folder.
    """

    def __init__(
        self,
        data_dir: str | Path,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        certificate: Certificate | None = None,
        behind_proxy: bool = False,
        public_url: str | None = None,
        **store_options: Any,
    ) -> None:
        address = Address(host, certificate is not None, behind_proxy, public_url)
        accounts = Accounts(Path(data_dir) / "accounts.json", required=address.shared)
        address.check(bool(accounts.list()))
        self._store = Store(Path(data_dir), **store_options)
        try:
            self._listener = _Listener(address, port, Routes(self._store, accounts), accounts, certificate)
        except BaseException:
            self._store.close()
            raise
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return self._listener.url

    def start(self) -> None:
        """Serve from a daemon thread until `close`."""
        serve = self._listener.serve_forever
        self._thread = threading.Thread(target=serve, args=(0.05,), name="mmhub-hub", daemon=True)
        self._thread.start()

    def serve_forever(self) -> None:
        """Serve until `close` or until this thread is interrupted, which may happen at any time."""
        self.start()
        assert self._thread is not None
        while self._thread.is_alive():  # a join without limit would not notice signals
            self._thread.join(3600)

    def close(self, grace: float = 0) -> None:
        """Stop accepting, give requests that are being answered `grace` seconds to end, and release the data folder."""
        if self._thread is not None:
            self._listener.shutdown()
            self._thread.join()
            self._thread = None
        self._listener.server_close()
        self._listener.drain(grace)
        self._store.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Listener(ThreadingHTTPServer):
    """Accepts connections, one thread each, and knows which are open and which of them are in use."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, address: Address, port: int, routes: Routes, accounts: Accounts, certificate: Certificate | None
    ) -> None:
        self.address, self.routes, self.accounts, self._certificate = address, routes, accounts, certificate
        self.draining = False
        self._open: dict[Any, bool] = {}  # the oldest first; True while a request is being answered
        self._changed = threading.Condition()
        if ":" in address.host:
            self.address_family = socket.AF_INET6
        super().__init__((address.host, port), _Connection)
        shown = f"[{address.host}]" if ":" in address.host else address.host
        self.local_url = f"{'https' if certificate else 'http'}://{shown}:{self.server_address[1]}"
        self.url = address.public_url or self.local_url

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own would ask DNS for the host's name
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[Any, Any]:
        try:
            connection, peer = super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                _log.error("cannot accept a connection: %s", error.strerror)
                time.sleep(0.1)  # it would be tried again at once
            raise
        if self._certificate is not None:
            connection = self._certificate.wrap(connection)
        return connection, peer

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Make room for a connection, or refuse it when all are in use."""
        with self._changed:
            if len(self._open) >= MAX_CONNECTIONS:
                idle = next((connection for connection, busy in self._open.items() if not busy), None)
                if idle is None:
                    if self._certificate is None:
                        with suppress(OSError):
                            request.send(_BUSY)
                    return False
                del self._open[idle]
                _cut(idle)
            self._open[request] = False
        return True

    @contextmanager
    def answering(self, connection: Any) -> Iterator[None]:
        """Mark a connection as one that should not be cut now."""
        with self._changed:
            if connection in self._open:
                self._open[connection] = True
        try:
            yield
        finally:
            with self._changed:
                if connection in self._open:
                    self._open[connection] = False
                    self._changed.notify_all()

    def shutdown_request(self, request: Any) -> None:
        try:
            super().shutdown_request(request)
        finally:
            with self._changed:
                self._open.pop(request, None)
                self._changed.notify_all()

    def drain(self, grace: float, seconds: float = 5) -> None:
        """End the connections that clients keep alive, then those in use, and wait for their threads to notice."""
        with self._changed:
            self.draining = True
            for connection, busy in self._open.items():
                if not busy:
                    _cut(connection)
            self._changed.wait_for(lambda: not any(self._open.values()), grace)
            for connection in self._open:
                _cut(connection)
            self._changed.wait_for(lambda: not self._open, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("connection from %s ended in an error", client_address, exc_info=True)


def _cut(connection: Any) -> None:
    with suppress(OSError):  # the client may have been faster
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # TLS must not say goodbye from another thread


class _Connection(BaseHTTPRequestHandler):
    """One client connection, from bytes to `Request` and from `Response` to bytes."""

    protocol_version = "HTTP/1.1"
    server_version = "mmhub-hub"
    sys_version = ""
    timeout = SOCKET_SECONDS
    disable_nagle_algorithm = True  # headers and body are two writes
    server: _Listener

    def setup(self) -> None:
        if isinstance(self.request, ssl.SSLSocket):
            self.request.settimeout(self.timeout)
            self.request.do_handshake()
        super().setup()
        self.rfile.close()
        self._reader = PacedReader(self.connection, self.timeout)
        self.rfile = io.BufferedReader(self._reader, _PIECE)

    def handle_one_request(self) -> None:
        self._reader.expect_head()
        self._started, self._request_id = time.monotonic(), secrets.token_hex(8)
        self._status = self._sent = 0
        super().handle_one_request()

    def _serve(self) -> None:
        self._started = time.monotonic()
        given = self.headers.get("X-Request-Id") or self.headers.get("X-Amzn-Trace-Id") or ""
        self._request_id = given if _REQUEST_ID.fullmatch(given) else self._request_id
        self._reader.expect_body()
        with self.server.answering(self.connection):
            try:
                self._exchange()
            except (ConnectionError, TimeoutError, ssl.SSLError, Invalid):
                self.close_connection = True
            finally:
                self._log_access()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _exchange(self) -> None:
        body: Body | None = None
        try:
            body = Body(self.rfile, self.headers)  # type: ignore[arg-type]
            response = self._answer(body)
        except HubError as error:
            response = self._refusal(error)
        if body is None or not body.ends_within(_DRAIN_LIMIT) or self.server.draining:
            self.close_connection = True
        self._send(response)
        if body is not None:  # a client that is still sending would not see the answer if the connection were cut now
            body.drain(_DRAIN_LIMIT)

    def _answer(self, body: Body) -> Response:
        try:
            path, _, query = self.path.partition("?")
            base = self.server.address.base(self.headers, self.server.local_url)
            self._sign_in(path)
            request = Request(self.command, path, form(query), self.headers, body, base)
            return self.server.routes.handle(request)
        except (HubError, ConnectionError, TimeoutError):
            raise
        except OSError as error:
            _log.error("%s failed: %s", self._line(), error)
            raise StorageFailed(f"The hub's disk refused: {error.strerror}.") from None
        except Exception:
            _log.exception("%s failed", self._line())
            raise HubError(f"Internal error of the hub; its log says more under {self._request_id}.") from None

    def _sign_in(self, path: str) -> None:
        """Let the token of a signed-in browser stand in for `Authorization`, to look at pages and files only."""
        if self.command not in ("GET", "HEAD") or path.startswith("/api/") or "Authorization" in self.headers:
            return
        with suppress(CookieError):
            for name, morsel in SimpleCookie(self.headers.get("Cookie", "")).items():
                token = self.server.accounts.sessions.token(morsel.value) if name in web.COOKIES else None
                if token is not None and self.server.accounts.authenticate(token) is not None:
                    self.headers["Authorization"] = f"Bearer {token}"
                    return

    def _refusal(self, error: HubError) -> Response:
        if self.command == "GET" and "text/html" in self.headers.get("Accept", ""):
            return web.refusal(error)
        return Response.refusal(error)

    def _send(self, response: Response) -> None:
        if response.file is None:
            self._send_head(response, len(response.body))
            if self.command != "HEAD":
                self._write(response.body)
            return
        path, start, count = response.file
        try:
            file = open(path, "rb")  # noqa: SIM115 - closed below
        except OSError:
            _log.error("cannot read %s", path, exc_info=True)
            self._send(Response.refusal(HubError("The hub cannot read this file from its disk.")))
            return
        with file:
            self._send_head(response, count)
            if self.command != "HEAD" and count and self._send_file(file, start, count) < count:
                self.close_connection = True  # the file is shorter than it should be

    def _send_file(self, file: Any, start: int, count: int) -> int:
        if not isinstance(self.connection, ssl.SSLSocket):
            sent = self.connection.sendfile(file, start, count)
            self._sent += sent
            return sent
        file.seek(start)
        sent = 0
        while sent < count and (piece := file.read(min(4 * _PIECE, count - sent))):
            self._write(piece)
            sent += len(piece)
        return sent

    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        for start in range(0, len(view), _PIECE):
            self.wfile.write(view[start : start + _PIECE])
        self._sent += len(view)

    def _send_head(self, response: Response, length: int) -> None:
        self._status = response.status
        self.send_response(response.status)
        for name, value in {**_SAFE, **response.headers}.items():
            self.send_header(name, value)
        self.send_header("X-Request-Id", self._request_id)
        self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what never became a request (a malformed first line, headers too long, an unknown method)."""
        self.close_connection = True
        self.command = getattr(self, "command", None) or ""
        self._send(Response.of({"error": message or "The request is malformed."}, code))
        self._log_access()

    def _line(self) -> str:
        """Return method and path for a log, without the query: it may hold a signature."""
        path = getattr(self, "path", "").partition("?")[0]
        return f"{self.command or '-'} {quote(path, safe='/%!$&()*+,;=:@~', errors='replace')[:500]}"

    def _log_access(self) -> None:
        if _access_log.isEnabledFor(logging.INFO):
            now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
            seconds = time.monotonic() - self._started
            facts = f"{self._status or '-'} {self._sent} {seconds:.3f}s {self._request_id}"
            _access_log.info('%s %s "%s" %s', now, self.client_address[0], self._line(), facts)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: the lines of the base class hold the query."""
