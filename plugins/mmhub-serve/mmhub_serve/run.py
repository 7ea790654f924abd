"""A server from its socket to its last answer: listens first, loads meanwhile, and stops without losing a request.

uvicorn's own `Server` closes idle connections the moment it is stopped, also those whose next request is on its way,
and ends by the signal that stopped it. Here whoever asks while the server stops is answered, with `Connection: close`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from functools import partial
from typing import Any

from fastapi import FastAPI
from uvicorn.config import Config
from uvicorn.lifespan.on import LifespanOn
from uvicorn.server import ServerState

from mmhub.errors import ExitCode, MmhubError, UsageError
from mmhub_serve.memory import Rests, give_back, keep_few_kernels
from mmhub_serve.protocol import Connection, Rules
from mmhub_serve.settings import Settings

log = logging.getLogger("mmhub_serve")
_TICK = 0.1  # seconds between two looks at every connection
_QUIET = 0.5  # seconds in which clients that stay connected may still ask while the server stops
_LAST = 5.0  # seconds that letting go of the models may take after that
_BACKLOG = 2_048
_FILES = 512  # that the process has open beside its connections


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; what connects waits until the server runs.

    Raises:
        UsageError: no such address. MmhubError: it is in use, or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(f"--host {host} is no address of this machine: {error.strerror or error}") from None
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    dual = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
    except OSError as error:
        cause = (error.strerror or str(error)).lower()
        hint = "choose another with --port, or 0 for a free one"
        raise MmhubError(f"cannot listen at {host} port {port}: {cause}", hint) from None


def tls_of(settings: Settings) -> ssl.SSLContext | None:
    """Return what the certificate makes of connections.

    Raises:
        UsageError: the certificate or the key cannot be used.
    """
    if settings.certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    chain, key = settings.certificate
    try:
        context.load_cert_chain(chain, key, password="")  # a key with a password is an error, not a question
    except (OSError, ValueError) as error:
        cause = error.strerror or error.__class__.__name__ if isinstance(error, OSError) else error
        raise UsageError(f"--tls-cert {chain} and --tls-key {key} cannot be used: {cause}", "both are PEM") from None
    return context


def start(settings: Settings, listener: socket.socket, told: Callable[[str], None]) -> None:
    """Serve until stopped, then exit; `told` gets the address once it answers.

    Raises:
        MmhubError: a model has no such name, or lacks a plugin, or the first one cannot be loaded; there is no such
            device.
        SystemExit: with the exit code, otherwise.
    """
    import gc

    from mmhub.device import find_device

    keep_few_kernels()
    with listener:
        for name in settings.models:
            _check_name(name)
        find_device(settings.device)
        tls = tls_of(settings)
        from mmhub_serve.app import build_app
        from mmhub_serve.shell import log_to_stderr

        _set_logs()
        if settings.access_log:
            log_to_stderr()
        server = Server(build_app(settings), listener, tls)
        gc.freeze()  # the modules: no collection has to look at them again
        raise SystemExit(asyncio.run(server.serve(lambda: told(server.url))))


def _check_name(name: str) -> None:
    """Refuse what can be known to fail without loading a model."""
    from mmhub.checkpoint import check_requirements, is_checkpoint, read_config
    from mmhub.names import resolve

    found = resolve(name)
    if found.path is not None and is_checkpoint(found.path):
        check_requirements(name, read_config(found.path))


def _set_logs() -> None:
    """What clients do wrong is their matter: only failures of the server are lines on its stderr."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for name in ("uvicorn", "asyncio"):  # asyncio warns of every client that hung up
        logging.getLogger(name).setLevel(logging.ERROR)


class Server:
    """Runs one application on one socket.

    Attributes:
        url: where it answers. loop: that it runs on. failure: why it stopped by itself.
    """

    def __init__(self, app: FastAPI, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        self._app, self._listener, self._tls = app, listener, tls
        self._settings: Settings = app.state.settings
        self._rules = Rules(self._settings, app.state.metrics)
        self._state = ServerState()
        host, port = listener.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if tls else 'http'}://{name}:{port}"
        self.failure: BaseException | None = None
        self._code = ExitCode.OK
        self._asked = 0

    async def serve(self, ready: Callable[[], None] = lambda: None) -> int:
        """Answer requests until `stop` or a signal, and return the exit code. `ready` is called once it listens.

        Raises:
            MmhubError: the first model cannot be loaded.
        """
        self._stopped, self._forced = asyncio.Event(), asyncio.Event()
        self.loop = asyncio.get_running_loop()
        _allow_files(self._settings.limits.connections)
        config = Config(
            self._app, http="h11", ws="none", log_config=None, proxy_headers=False, server_header=False, lifespan="on"
        )
        config.timeout_keep_alive = self._settings.limits.idle_seconds  # type: ignore[assignment]
        config.load()
        life = LifespanOn(config)
        await life.startup()
        with self._signals() as own:
            await self._open(config, life)
            try:
                await self._answer(ready)
            except Exception as error:
                self._fail(error)
            await self._end(life, own)
        if self.failure is not None:
            raise self.failure
        return self._code

    def stop(self, code: int = ExitCode.OK) -> None:
        """Ask the server to stop; a second time, to stop at once. From other threads: by `call_soon_threadsafe`."""
        self._asked += 1
        if self._asked == 1:
            self._code = ExitCode(code)
            self._app.state.health.stopping = True
        self._stopped.set()
        if self._asked > 1:
            self._forced.set()

    # --- while it runs

    async def _open(self, config: Config, life: LifespanOn) -> None:
        def connection() -> Connection:
            return Connection(
                config=config, server_state=self._state, app_state=life.state, _loop=self.loop, rules=self._rules
            )

        limit = self._settings.limits.head_seconds
        options: dict[str, Any] = {"ssl": self._tls, "ssl_handshake_timeout": limit} if self._tls else {}
        self._server = await self.loop.create_server(connection, sock=self._listener, backlog=_BACKLOG, **options)
        self._accepted = partial(self.loop.connect_accepted_socket, connection, **options)

    async def _answer(self, ready: Callable[[], None]) -> None:
        self._check()
        ready()
        self._app.state.health.loading.add_done_callback(self._loaded)
        rests = Rests(self.loop.time())
        while not self._stopped.is_set():
            self._check()
            busy = bool(self._state.tasks) or self._app.state.pool.busy
            if rests.due(self.loop.time(), busy, self._state.total_requests):
                await asyncio.to_thread(give_back)
            await _wait(self._stopped, _TICK)

    def _loaded(self, task: asyncio.Task[None]) -> None:
        """End a server whose first model cannot be loaded: nobody would be answered."""
        if not task.cancelled() and task.exception() is not None:
            self._fail(task.exception())

    def _fail(self, error: BaseException | None) -> None:
        self.failure = error
        self.stop(ExitCode.FAILURE)
        self.stop()

    def _check(self) -> None:
        now = self.loop.time()
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        for one in list(self._state.connections):
            assert isinstance(one, Connection)
            try:
                one.check(now)
            except Exception:  # one client's; the others are served
                log.exception("a connection failed")
                one.transport.abort()
        self._rules.metrics.set_connections(len(self._state.connections))

    # --- while it stops

    async def _end(self, life: LifespanOn, own: bool) -> None:
        until = self.loop.time() + self._settings.grace
        await _wait(self._forced, _TICK / 2)  # who has connected is accepted
        with suppress(NotImplementedError):  # Windows
            self.loop.remove_reader(self._listener)
        await asyncio.sleep(0)  # asyncio loses what it accepts while its server is closed
        began, rest = self.loop.time(), self._rest()
        self._server.close()
        known = asyncio.gather(*map(self._accepted, rest), return_exceptions=True)
        with suppress(TimeoutError):
            await asyncio.wait_for(known, _QUIET if self._tls else None)  # there may be one who says nothing
        await _wait(self._forced, _TICK / 2)
        while self._state.connections and self.loop.time() < until and not self._forced.is_set():
            self._check()
            now = self.loop.time()
            for one in list(self._state.connections):
                if isinstance(one, Connection) and min(now - began, one.waited(now)) > _QUIET:
                    one.drop()
            await _wait(self._forced, _TICK / 2)
        loading = self._app.state.pool.busy or not self._app.state.health.loading.done()
        idle = not self._state.connections and not loading
        await self._let_go()
        try:
            await asyncio.wait_for(life.shutdown(), _LAST if idle else _TICK)
        except TimeoutError:
            idle = False
        if own and not idle and self.failure is None:  # a thread still computes: the interpreter would wait for it
            _leave(self._code)

    def _rest(self) -> list[socket.socket]:
        """Who has connected and is not accepted yet: the system would reset those when the listener is closed."""
        found = []
        with suppress(OSError):  # there are no more
            while True:
                found.append(self._listener.accept()[0])
        return found

    async def _let_go(self) -> None:
        """End what is left: told that the server stops where no answer has begun."""
        for task in list(self._state.tasks):
            task.cancel()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=_TICK)
        for one in list(self._state.connections):
            one.transport.close()
        await asyncio.sleep(0)

    @contextmanager
    def _signals(self) -> Iterator[bool]:
        """Stop on SIGTERM with 0, and on Ctrl-C with 130; yield whether this process is ours to end."""
        codes = {signal.SIGTERM: ExitCode.OK, signal.SIGINT: ExitCode.INTERRUPTED}
        try:
            for number, code in codes.items():
                self.loop.add_signal_handler(number, self.stop, code)
        except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
            yield False
            return
        try:
            yield True
        finally:
            for number in codes:
                self.loop.remove_signal_handler(number)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _allow_files(connections: int) -> None:
    """Raise the soft limit of open files to what the connections need, where there is such a limit."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = connections + _FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
