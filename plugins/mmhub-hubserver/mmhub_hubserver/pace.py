"""Reading from a client that may be slow on purpose: every request has a time budget of waiting."""

import io
import socket
import ssl
import time

BODY_RATE = 1024  # bytes a second that the body of a request must keep up


class PacedReader(io.RawIOBase):
    """The bytes a client sends. Only the time spent waiting for the client counts, not what the hub does between.

    Args:
        seconds: the longest wait for anything at all, and for the whole head of a request.

    Raises:
        TimeoutError: the client used up its time.
        ConnectionError: the client went away.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._seconds = connection, seconds
        self._left, self._rate = seconds, 0.0

    def expect_head(self) -> None:
        self._left, self._rate = self._seconds, 0.0

    def expect_body(self) -> None:
        self._left, self._rate = self._seconds, 1 / BODY_RATE

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        if self._left <= 0:
            raise TimeoutError("the client sends too slowly")
        self._connection.settimeout(min(self._left, self._seconds))
        started = time.monotonic()
        try:
            count = self._connection.recv_into(buffer)
        except ssl.SSLError as error:
            raise ConnectionResetError(str(error)) from None
        finally:
            self._connection.settimeout(self._seconds)
        self._left += count * self._rate - (time.monotonic() - started)
        return count
