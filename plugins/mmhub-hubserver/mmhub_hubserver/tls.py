"""The certificate of a hub that speaks TLS itself, read again when it was renewed on disk."""

import logging
import socket
import ssl
from pathlib import Path

_log = logging.getLogger("mmhub_hubserver")


class Certificate:
    """A certificate chain and its private key, both PEM files.

    Raises:
        ValueError: they cannot be read, or do not belong together.
    """

    def __init__(self, chain: str | Path, key: str | Path) -> None:
        self._chain, self._key = Path(chain), Path(key)
        self._stamp = self._stamps()
        self._context = self._load()

    def wrap(self, connection: socket.socket) -> ssl.SSLSocket:
        """Return the connection as one that still has to shake hands."""
        self._renew()
        return self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)

    def _renew(self) -> None:
        try:
            stamp = self._stamps()
            if stamp != self._stamp:
                self._stamp = stamp
                self._context = self._load()
        except ValueError as error:
            _log.warning("The old certificate stays in use: %s", error)

    def _stamps(self) -> tuple[int, ...]:
        try:
            return tuple(path.stat().st_mtime_ns for path in (self._chain, self._key))
        except OSError as error:
            raise ValueError(f"Cannot read {error.filename}: {error.strerror}.") from None

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._chain, self._key, password="")  # an encrypted key fails instead of asking
        except OSError as error:  # also ssl.SSLError
            reason = getattr(error, "reason", None) or error.strerror or error
            raise ValueError(f"{self._chain} and {self._key} are no certificate and its key: {reason}.") from None
        return context
