"""HTTP/1.1 with strangers: uvicorn's h11 protocol, with a bound on everything that a client may do.

h11 parses, uvicorn runs the application; what is refused before there is a request to run is refused here, and so are
clients that are slow to send or to take an answer. `Connection.check` is called a few times a second by the server.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from mmhub_serve.access import Access
from mmhub_serve.errors import Refused
from mmhub_serve.metrics import Metrics
from mmhub_serve.settings import Settings
from mmhub_serve.shell import SAFETY, log_line, new_id

_LINGER = 1.0  # seconds in which a client that was refused may read why, while it still sends
_DISCARDED = 4 * 2**20  # bytes of those that are read
_CHUNKS = 1_000  # however small; after those they are 64 bytes on average
_RATE = 128 * 2**10  # bytes a second: what has come earns a body so much more time


class Rules:
    """What the connections of one server have in common: bounds, and the bytes of all bodies that are held."""

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        self.limits, self.access, self.metrics = settings.limits, Access(settings), metrics or Metrics()
        self.access_log = settings.access_log
        self.bodies = 0


class _Reader(h11.Connection):
    """Parses requests, and refuses what h11 lets pass; `refused` says why."""

    def __init__(self, rules: Rules) -> None:
        super().__init__(h11.SERVER, rules.limits.header)
        self._rules = rules
        self.refused: Refused | None = None
        self.method = self.path = self.version = b""
        self.heads = self.body = self._chunks = 0

    def next_event(self) -> Any:
        before = self.their_state
        if before is h11.IDLE:
            self._skip_blank()
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._begin(event)
            elif isinstance(event, h11.Data):
                self._count(event)
        except h11.RemoteProtocolError as error:
            self.refused = self._malformed(error, before is h11.IDLE)
            raise
        except Refused as refused:
            self.refused = refused
            raise h11.RemoteProtocolError(refused.message) from None
        return event

    def send(self, event: Any) -> Any:
        if isinstance(event, h11.Response) and self.their_state is h11.SEND_BODY:  # the rest is not waited for
            headers = [pair for pair in event.headers if pair[0] != b"connection"]
            headers.append((b"connection", b"close"))
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send(event)

    def release(self) -> None:
        """Give back what the body took."""
        self._rules.bodies -= self.body
        self.body = 0

    @property
    def partial(self) -> bool:
        """Has a part of a request's head come?"""
        return self.their_state is h11.IDLE and bool(self.trailing_data[0])

    def _begin(self, request: h11.Request) -> None:
        self.release()
        self.heads, self._chunks = self.heads + 1, 0
        self.method, self.version = request.method, request.http_version
        self.path = request.target.partition(b"?")[0]
        _check_size(request, self._rules)
        _check_form(request)
        for name, value in request.headers:
            if name == b"host":
                self._rules.access.check_host(value)
            elif name == b"content-length" and int(value) > self._rules.limits.body:
                raise _too_large(self._rules)

    def _count(self, data: h11.Data) -> None:
        self.body += len(data.data)
        self._rules.bodies += len(data.data)
        self._chunks += data.chunk_start
        if self.body > self._rules.limits.body:
            raise _too_large(self._rules)
        if self._rules.bodies > self._rules.limits.bodies:
            raise Refused(503, "the requests of others take all the memory there is", "ask again later")
        if self._chunks > _CHUNKS + self.body // 64:
            raise Refused(400, "the chunks of the body are too small")

    def _skip_blank(self) -> None:
        """Pass over line breaks before a request, with which some clients end the body before (RFC 9112, 2.2)."""
        data = self.trailing_data[0]
        blank = len(data) - len(data.lstrip(b"\r\n"))
        if blank:
            self._receive_buffer.maybe_extract_at_most(blank)

    def _malformed(self, error: h11.RemoteProtocolError, in_head: bool) -> Refused:
        if error.error_status_hint == 431 and in_head:
            line = b"\n" in self.trailing_data[0]
            return _long_head(self._rules) if line else Refused(414, "the request line is too long")
        return Refused(400, f"this is not HTTP/1.1: {str(error).partition(':')[0]}")


def _check_size(request: h11.Request, rules: Rules) -> None:
    if len(request.target) > rules.limits.target:
        raise Refused(414, f"the address has {len(request.target)} bytes, more than {rules.limits.target}")
    size = sum(len(name) + len(value) + 4 for name, value in request.headers)
    if len(request.headers) > rules.limits.headers or size > rules.limits.header:
        raise _long_head(rules)


def _check_form(request: h11.Request) -> None:
    names = {name for name, _ in request.headers}
    if request.http_version not in (b"1.0", b"1.1"):
        raise Refused(400, "this server speaks HTTP/1.1")
    if not request.target.startswith(b"/") and (request.method, request.target) != (b"OPTIONS", b"*"):
        raise Refused(400, "a request names a path that begins with /")
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version == b"1.0"):
        raise Refused(400, "the body has two lengths, Content-Length and Transfer-Encoding")


def _too_large(rules: Rules) -> Refused:
    return Refused(413, f"the body has more than {rules.limits.body} bytes", "send less, or smaller media")


def _long_head(rules: Rules) -> Refused:
    return Refused(431, f"there are more than {rules.limits.headers} headers or {rules.limits.header} bytes of them")


class _Outlet:
    """The transport as an answer has it: when it closes it, a client that still sends can read the answer first."""

    def __init__(self, connection: Connection) -> None:
        self.write, self.is_closing = connection.transport.write, connection.transport.is_closing
        self.close = connection.part


class Connection(H11Protocol):
    """One client: everything it does ends by itself, or at a time that is set from the start."""

    def __init__(self, *args: Any, rules: Rules, **options: Any) -> None:
        super().__init__(*args, **options)
        self._rules, self._limits = rules, rules.limits
        self.conn = self._reader = _Reader(rules)
        self._due = self._left = self._closed = self._stuck = self._measured = math.inf
        self._phase: tuple[Any, ...] = ()
        self._since = 0.0
        self._discarded = self._mark = self._probes = 0
        self._ended = False

    @property
    def idle(self) -> bool:
        """Is there no request in progress?"""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and self.conn.their_state is h11.IDLE and self._left == math.inf

    @property
    def waits(self) -> bool:
        """Is it idle, with not a byte of the next request?"""
        return self.idle and not self._reader.partial

    def waited(self, now: float) -> float:
        """Return for how many seconds it `waits`, from when it was made or from its last answer."""
        return now - self._since if self.waits else 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._outlet: Any = _Outlet(self)
        self._since = self.loop.time()
        self._due = self._since + self._limits.head_seconds
        if len(self.connections) > self._limits.connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if self._left < math.inf:
            self._discarded += len(data)
            if self._discarded > _DISCARDED:
                self.flow.pause_reading()
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.more_body and not self._reader.trailing_data[0]:
            self.flow.resume_reading()  # paused for a large body: who goes now must be noticed
        self._watch()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # its task has not begun
            self.cycle.transport = self._outlet

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that closed its half waits for the answer, unless it is gone: then two probes end the connection."""
        self._ended = True
        if self._reader.partial or self.conn.their_state is h11.SEND_BODY:
            self._refuse(Refused(400, "the request ended early"))
        if self.idle or self.scheme == "https" or self._left < math.inf:
            return None
        self.cycle.keep_alive = False
        self._probes = 2
        self._probe()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._reader.release()
        self._abandon()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._reader.refused or Refused(400, msg))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._since = self.loop.time()
        if self.idle:
            self._reader.release()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stuck = math.inf

    def check(self, now: float) -> None:
        """End what took too long."""
        if self.transport.is_closing():
            self._closed = min(self._closed, now)
        patience = self._limits.read_seconds
        if now > min(self._left + _LINGER, self._closed + patience, self._stuck + patience):
            self.transport.abort()
        elif self._left == math.inf and not self.transport.is_closing():
            if now > self._due + self._earned() or self._crawls(now):
                self._late()
            elif self._probes:
                self._probe()

    def drop(self) -> None:
        """Close a connection that is idle."""
        self._left = self.loop.time()
        self.transport.close()

    def part(self) -> None:
        """Close after an answer."""
        if self.conn.their_state is h11.SEND_BODY:
            self._linger()
        else:
            self.transport.close()

    # --- deadlines

    def _watch(self) -> None:
        """Set the deadline of what the client has to send now."""
        state = self.conn.their_state
        phase = (state, self._reader.heads, self._reader.partial)
        if phase == self._phase:
            return
        self._phase, now = phase, self.loop.time()
        self._due = self._measured = math.inf
        if state is h11.SEND_BODY:
            self._due, self._measured, self._mark = now + self._limits.body_seconds, now, self._reader.body
        elif self._reader.partial:
            self._due = now + self._limits.head_seconds
        elif state is h11.IDLE:
            self._due = now + (self._limits.idle_seconds if self._reader.heads else self._limits.head_seconds)

    def _earned(self) -> float:
        """The seconds that a body has beyond `body_seconds`: a large one may come over a slow line, if it comes."""
        return self._reader.body / _RATE if self.conn.their_state is h11.SEND_BODY else 0.0

    def _crawls(self, now: float) -> bool:
        """Does the body come too slowly? Measured over as long as headers may take."""
        if now - self._measured < self._limits.head_seconds:
            return False
        came, wanted = self._reader.body - self._mark, self._limits.pace * (now - self._measured)
        self._measured, self._mark = now, self._reader.body
        return came < wanted and not self.flow.read_paused

    def _late(self) -> None:
        if self.waits:
            self.drop()
        else:
            self._refuse(Refused(408, "the request took too long to come"))

    # --- ends

    def _make_room(self) -> None:
        others = [one for one in self.connections if isinstance(one, Connection) and one is not self]
        spare = [one for one in others if (one.idle or one._left < math.inf) and not one.transport.is_closing()]
        if spare:
            min(spare, key=lambda one: (one._left == math.inf, not one.waits, one._since)).drop()
        else:
            self._refuse(Refused(503, f"all {self._limits.connections} connections are busy", "ask again later"))

    def _refuse(self, refused: Refused) -> None:
        """Say why, stop the application, and close once the client has had time to read it."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            self._rules.metrics.observe_request("other", "refused", "", refused.status, 0.0)
            self._write(refused)
        self._abandon()
        self._linger()

    def _linger(self) -> None:
        """Close once the client has had time to read what was sent: closed at once, what it still sends resets it."""
        self._reader.release()
        self._left = self.loop.time()
        if self._ended or not self.transport.can_write_eof():
            self.transport.close()
        elif not self.transport.is_closing():
            with suppress(OSError):  # it is gone: `connection_lost` is on its way
                self.transport.write_eof()
            self.flow.resume_reading()

    def _write(self, refused: Refused) -> None:
        content = refused.content()
        request_id, known = new_id(), self.conn.our_state is h11.SEND_RESPONSE
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"}
        headers |= {"X-Request-Id": request_id} | refused.headers
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()] + SAFETY
        reason = STATUS_PHRASES[refused.status]
        data = b"" if known and self._reader.method == b"HEAD" else content
        answer = h11.Response(status_code=refused.status, headers=pairs, reason=reason), h11.Data(data=data)
        for event in (*answer, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self._rules.access_log:
            method, path = (self._reader.method, self._reader.path) if known else (b"-", b"-")
            client = self.client[0] if self.client else "-"
            log_line(client, method.decode(), path.decode("latin-1"), refused.status, len(data), 0.0, request_id)

    def _abandon(self) -> None:
        """Stop the application where it still works on an answer that nobody will read."""
        if self.cycle is None or self.cycle.response_complete:
            return
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        state = self.scope["state"]
        state["gone"] = True
        if "task" in state:
            state["task"].cancel()

    def _probe(self) -> None:
        """Write what a client passes over, and the kernel of one that is gone answers with a reset."""
        self._probes -= 1
        if self.conn.our_state is h11.SEND_RESPONSE and self._reader.version == b"1.1":
            probe = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(probe) or b"")
