"""The hub as a running server: sockets, limits and shutdown. What a path means is left to `routes`.

A client never sees a stack trace and never waits on a stuck connection: every read and write has a time limit, and an
unexpected error is logged here and answered with a bare 500.
"""

import ipaddress
import logging
import re
import socket
import socketserver
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmhub_hubserver.errors import Forbidden, HubError, Invalid, StorageFailed
from mmhub_hubserver.routes import Routes
from mmhub_hubserver.store import Store
from mmhub_hubserver.wire import Body, Request, Response, form

SOCKET_SECONDS = 30
_DRAIN_LIMIT = 64 << 20  # bytes of a refused upload that are read so that the client sees the refusal
_HOST = re.compile(r"([A-Za-z0-9.\-]+|\[[0-9A-Fa-f:]+\])(?::\d{1,5})?")
_log = logging.getLogger("mmhub_hubserver")


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HubServer:
    """A hub on loopback over one data folder.

    As a context manager it serves from a background thread:

        with HubServer(folder) as hub:
            HfApi(endpoint=hub.url, token=False).create_repo("org/model")

    Port 0 takes a free port. Raises `ValueError` for a host that is not loopback, `OSError` if the port is taken, and
    `StoreUnusable` if another server holds the data folder.
    """

    def __init__(self, data_dir: str | Path, host: str = "127.0.0.1", port: int = 0) -> None:
        if not is_loopback(host):
            raise ValueError(f"{host!r} is not a loopback address; this hub has no access control yet")
        self._store = Store(Path(data_dir))
        try:
            self._listener = _Listener(host, port, Routes(self._store))
        except BaseException:
            self._store.close()
            raise
        self._serving = False

    @property
    def url(self) -> str:
        return self._listener.url

    def start(self) -> None:
        """Serve from a daemon thread until `close`."""
        self._serving = True
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), name="mmhub-hub", daemon=True).start()

    def serve_forever(self) -> None:
        """Serve from this thread until `close` or an interrupt."""
        self._serving = True
        self._listener.serve_forever()

    def close(self) -> None:
        """Stop accepting, cut open connections and release the data folder."""
        if self._serving:
            self._listener.shutdown()
            self._serving = False
        self._listener.server_close()
        self._listener.cut_connections()
        self._store.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Listener(ThreadingHTTPServer):
    """Accepts connections, one thread each, and knows which are open."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, routes: Routes) -> None:
        self.routes = routes
        self._open: set[Any] = set()
        self._changed = threading.Condition()
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Connection)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_address[1]}"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own would ask DNS for the host's name
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        with self._changed:
            self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        try:
            super().shutdown_request(request)
        finally:
            with self._changed:
                self._open.discard(request)
                self._changed.notify_all()

    def cut_connections(self, seconds: float = 5) -> None:
        """End the connections that clients keep alive, and wait for their threads to notice."""
        with self._changed:
            for connection in self._open:
                with suppress(OSError):  # the client may have been faster
                    connection.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._open, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("connection from %s ended in an error", client_address, exc_info=True)


class _Connection(BaseHTTPRequestHandler):
    """One client connection, from bytes to `Request` and from `Response` to bytes."""

    protocol_version = "HTTP/1.1"
    server_version = "mmhub-hub"
    sys_version = ""
    timeout = SOCKET_SECONDS
    disable_nagle_algorithm = True  # headers and body are two writes
    server: _Listener

    def _serve(self) -> None:
        body: Body | None = None
        try:
            try:
                body = Body(self.rfile, self.headers)
                response = self._answer(body)
            except HubError as error:
                response = Response.refusal(error)
            if body is None or not body.drain(_DRAIN_LIMIT):
                self.close_connection = True
            self._send(response)
        except (ConnectionError, TimeoutError, Invalid):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, body: Body) -> Response:
        try:
            path, _, query = self.path.partition("?")
            base = self._checked_base()
            request = Request(self.command, path, form(query), self.headers, body, base)
            return self.server.routes.handle(request)
        except (HubError, ConnectionError, TimeoutError):
            raise
        except OSError as error:
            _log.error("%s %s failed: %s", self.command, self.path, error)
            raise StorageFailed(f"The hub's disk refused: {error.strerror}.") from None
        except Exception:
            _log.exception("%s %s failed", self.command, self.path)
            raise HubError("Internal error of the hub; its log says more.") from None

    def _checked_base(self) -> str:
        """Return this server's address as the client wrote it, refusing requests that a web page caused.

        There is no login, so a page in the user's browser must not reach the hub through a rebound host name or by
        posting a form across origins.
        """
        host = self.headers.get("Host")
        if host is None:
            return self.server.url
        match = _HOST.fullmatch(host)
        if match is None or not is_loopback(match[1].strip("[]").lower()):
            raise Forbidden("This hub answers to loopback host names only.")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise Forbidden("This hub does not answer to other web pages.")
        return f"http://{host}"

    def _send(self, response: Response) -> None:
        if response.file is None:
            self._send_head(response, len(response.body))
            if self.command != "HEAD":
                self.wfile.write(response.body)
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
            if self.command != "HEAD" and count and self.connection.sendfile(file, start, count) < count:
                self.close_connection = True  # the file is shorter than it should be

    def _send_head(self, response: Response, length: int) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what never became a request (a malformed first line, headers too long, an unknown method)."""
        self.close_connection = True
        self.command = getattr(self, "command", None) or ""
        self._send(Response.of({"error": message or "The request is malformed."}, code))

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)
