"""Fetching what a public http(s) address holds, without reaching into the network that this machine stands in.

The host's addresses are looked up once, each of them is held against the policy, and the connection goes to one that
passed: a name that answers differently the second time gains nothing. Redirects are held against it in the same way.
Proxies from the environment are not used, because a proxy looks names up itself. Nothing is sent that tells who asks:
no cookies, no login, no token. Messages do not tell a host that is unknown from one that may not be fetched.
"""

from __future__ import annotations

import http.client
import io
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urljoin

import mmhub
from mmhub.errors import InputError, UsageError

if TYPE_CHECKING:
    from mmhub.interfaces.raw import Policy

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_LONGEST = 8192  # characters of an address; those that are signed are long
# One expression is parser and check at once, so that no two readings of an address can differ: printable ASCII without
# spaces and backslashes, no login, a host of letters or an IP address in its plain form.
_URL = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<target>(?:[/?][!-\[\]-~]*)?)",
    re.IGNORECASE,
)
_START = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
_NUMBER = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)", re.IGNORECASE)  # a last label that makes browsers see an IPv4 address
_PATTERN = re.compile(r"\*|(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_LOCALHOST = "127.0.0.0/8", "::1/128"
_REDIRECTS = (301, 302, 303, 307, 308)
_BLOCK = 1 << 16  # bytes read at a time
_NAT64 = ip_network("64:ff9b::/96")  # RFC 6052: the last four bytes are an IPv4 address
_GLOBAL_UNICAST = ip_network("2000::/3")
# IANA's registries of special addresses, as of 2025, for ipaddress knows them as its Python's version does; and Azure's
# platform, which answers each of its machines at a public address.
_SPECIAL = [
    ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        *("224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # of 2000::/3: Teredo, 6to4, examples
    )
]
_LOOKING = threading.BoundedSemaphore(32)  # look-ups at a time: whoever waits no longer for one cannot end it
_HINT = "only public hosts are fetched from; permit another by its IP address, as in --allow-host 10.0.0.7"


def fetch(url: str, policy: Policy) -> bytes:
    """Return the bytes that an address holds, at most `policy.max_bytes`, within `policy.fetch_seconds`.

    Raises:
        InputError: fetching is off, the address or one that it leads to is not permitted, or it gave no file.
    """
    if not policy.urls:
        hint = "download the file, or pass --allow-urls"
        raise InputError(f"'{shown_url(url)}' is a URL, and fetching is off", hint)
    clock = _Clock.of(policy)
    with _one_line(url, policy):
        here = Place.of(url, policy, clock)
        for _ in range(policy.max_redirects + 1):
            found = _ask(here, policy, clock)
            if isinstance(found, bytes):
                return found
            before, here = here, Place.of(urljoin(here.url, found), policy, clock)
            if before.scheme == "https" != here.scheme:
                raise _Failed("it leads from https to http")
        raise _Failed(f"it leads on more than {policy.max_redirects} times")


def shown_url(url: str) -> str:
    """Name an address in messages: without what may be secret in it.

    What stands before an @ may be a login, even where slashes or question marks in it hide that.

    >>> shown_url("https://ada:pw@example.org/a.png?signature=S"), shown_url("https://ada:p/w@example.org/a.png")
    ('https://example.org/a.png', 'https://...@example.org/a.png')
    """
    if url[:5].lower() == "data:":
        return "data:..."
    start = _START.match(url)
    head = start[0] if start else ""
    login, at, rest = url[len(head) :].rpartition("@")
    path = re.split("[?#]", rest, maxsplit=1)[0]
    if at and re.search("[?#]", login):
        path = "..."
    elif at and re.search("[/@]", login):
        path = f"...@{path}"
    text = head + path
    return "".join(c if c.isprintable() else "?" for c in (text if len(text) <= 200 else f"{text[:200]}..."))


@dataclass(frozen=True)
class Place:
    """A checked address: where to connect to and what to ask for. `addresses` are those of the host, all permitted."""

    url: str
    scheme: str
    host: str
    port: int
    target: str
    addresses: tuple[str, ...]

    @classmethod
    def of(cls, url: str, policy: Policy, clock: _Clock | None = None) -> Place:
        """Parse and check an address, and look its host up."""
        match = _URL.fullmatch(url.split("#")[0]) if len(url) <= _LONGEST else None
        if match is None:
            raise _Failed(_what_is_odd(url))
        scheme, host, target = match["scheme"].lower(), match["host"].lower(), match["target"]
        if scheme not in policy.schemes or scheme not in ("http", "https"):
            raise _Failed(f"its scheme is none of {', '.join(policy.schemes)}", "download the file, and give its path")
        port = int(match["port"] or (443 if scheme == "https" else 80))
        if not (port in (80, 443) or 1024 <= port <= 65535 or (policy.hosts and 0 < port < 1024)):
            raise _Failed(f"port {port} is not fetched from", "list the host with --allow-host")
        addresses = _look_up(host, port, clock or _Clock.of(policy))
        if not addresses or not all(_permitted(host, address, policy) for address in addresses):
            raise _Failed("its host is unknown, or not one that may be fetched from", _HINT)
        target = target if target.startswith("/") else f"/{target}"
        return cls(url, scheme, host, port, target, tuple(map(str, addresses)))


def networks_of(pattern: str) -> list[Network] | None:
    """Return the networks that an entry of `Policy.hosts` permits, even private ones; None for a name.

    >>> networks_of("10.0.0.0/8"), networks_of("*.example.org")
    ([IPv4Network('10.0.0.0/8')], None)

    Raises:
        UsageError: the entry is neither.
    """
    if pattern == "localhost":
        return [ip_network(text) for text in _LOCALHOST]
    try:
        return [ip_network(pattern.strip("[]"))]
    except ValueError:
        pass
    if _PATTERN.fullmatch(pattern) is None or _NUMBER.fullmatch(pattern.rsplit(".", 1)[-1]):
        hint = "write example.org, *.example.org, 10.0.0.7 or 10.0.0.0/8"
        raise UsageError(f"{pattern!r} is no host to fetch from", hint)
    return None


def is_public(address: Address) -> bool:
    """Say whether an address is one of the public internet, whatever it is wrapped in."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _SPECIAL)


class _Failed(Exception):
    """Why an address was not fetched: (reason) or (reason, hint)."""


@dataclass(frozen=True)
class _Clock:
    """What is left of the time that a whole fetch may take, whoever is slow."""

    end: float

    @classmethod
    def of(cls, policy: Policy) -> _Clock:
        return cls(time.monotonic() + policy.fetch_seconds)

    def left(self) -> float:
        """Return seconds. Raises TimeoutError when there are none."""
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds


@contextmanager
def _one_line(url: str, policy: Policy) -> Iterator[None]:
    """Say in our words, and without anything that the other side sent, why nothing was fetched."""

    def fail(reason: str, hint: str | None = None) -> NoReturn:
        raise InputError(f"cannot fetch '{shown_url(url)}': {reason}", hint) from None

    try:
        yield
    except _Failed as failed:
        fail(*failed.args)
    except TimeoutError:
        fail(f"it took longer than {policy.fetch_seconds:.3g} s", "download the file")
    except ssl.SSLCertVerificationError:
        fail("its certificate is not valid for the host", "check the address")
    except (OSError, http.client.HTTPException, ValueError):
        fail("the connection failed", "check the address and the network")


def _what_is_odd(url: str) -> str:
    if len(url) > _LONGEST:
        return f"the address has more than {_LONGEST} characters"
    if url[:5].lower() == "data:":
        return "data URLs are not read here: decode it, and give the bytes"
    if "@" in re.split("[/?#]", url.partition("//")[2])[0]:
        return "the address holds a login"
    return "it is no plain address: give scheme://host/path, with other characters than ASCII as %XX"


def _look_up(host: str, port: int, clock: _Clock) -> list[Address]:
    """Return all addresses of a host; none if it is unknown, or an IPv4 address in another form than a.b.c.d.

    Raises:
        TimeoutError: nobody has told in time.
    """
    if host.startswith("[") or _NUMBER.fullmatch(host.rsplit(".", 1)[-1]):
        try:
            return [ip_address(host.strip("[]"))]
        except ValueError:
            return []
    if not _LOOKING.acquire(timeout=clock.left()):
        raise TimeoutError
    told: queue.SimpleQueue[list[Address]] = queue.SimpleQueue()
    threading.Thread(target=lambda: told.put(_resolved(host, port)), daemon=True).start()
    try:
        return told.get(timeout=clock.left())
    except queue.Empty:
        raise TimeoutError from None


def _resolved(host: str, port: int) -> list[Address]:
    """Ask the system, which takes its own time."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [ip_address(str(entry[4][0]).split("%")[0]) for entry in found]
    except (OSError, ValueError):
        return []
    finally:
        _LOOKING.release()


def _permitted(host: str, address: Address, policy: Policy) -> bool:
    listed = [(pattern, networks_of(pattern)) for pattern in policy.hosts]
    if any(address in network for _, networks in listed for network in networks or ()):
        return True
    named = not listed or any(networks is None and _matches(host, pattern) for pattern, networks in listed)
    return named and (policy.private or is_public(address))


def _matches(host: str, pattern: str) -> bool:
    return pattern in ("*", host) or (pattern.startswith("*.") and host.endswith(pattern[1:]))


def _ask(place: Place, policy: Policy, clock: _Clock) -> bytes | str:
    """Return what is there, or the address that it leads to."""
    with _connected(place, clock) as connection:
        connection.putrequest("GET", place.target, skip_accept_encoding=True)
        connection.putheader("User-Agent", f"mmhub/{mmhub.__version__}")
        connection.putheader("Accept", "*/*")
        connection.putheader("Accept-Encoding", "identity")
        connection.putheader("Connection", "close")
        connection.endheaders()
        answer = connection.getresponse()
        if answer.status in _REDIRECTS:
            return answer.getheader("Location") or ""
        if answer.status != 200:
            raise _Failed(f"it answered {answer.status}", "check the address")
        if answer.getheader("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise _Failed("it answered in a compressed form that was not asked for", "download the file")
        return _body(answer, policy.max_bytes)


def _body(answer: http.client.HTTPResponse, most: int) -> bytes:
    content, stated = bytearray(), answer.length
    if stated is not None and stated > most:
        raise _Failed(f"it has {stated} bytes, more than the limit of {most}")
    while block := answer.read(_BLOCK):
        content += block
        if len(content) > most:
            raise _Failed(f"it has more bytes than the limit of {most}")
    if stated is not None and len(content) < stated:
        raise _Failed(f"{len(content)} of {stated} bytes came", "try again")
    return bytes(content)


@contextmanager
def _connected(place: Place, clock: _Clock) -> Iterator[http.client.HTTPConnection]:
    """Connect to an address that was checked, never to the name; the certificate is that of the name."""
    connection = http.client.HTTPConnection(place.host, place.port)
    connection.default_port = 443 if place.scheme == "https" else 80  # type: ignore[misc]  # left out of Host
    plain = _first_that_answers(place, clock)
    with plain:
        if place.scheme == "https":
            plain.settimeout(clock.left())
            plain = _tls().wrap_socket(plain, server_hostname=place.host.strip("[]"))
        with plain:
            connection.sock = _Timed(plain, clock)  # type: ignore[assignment]
            yield connection


def _first_that_answers(place: Place, clock: _Clock) -> socket.socket:
    """Connect to one of a host's addresses; one that does not answer leaves the others their share of the time."""
    failed: OSError = OSError()
    addresses = place.addresses[:4]
    for number, address in enumerate(addresses):
        try:
            return socket.create_connection((address, place.port), timeout=clock.left() / (len(addresses) - number))
        except OSError as error:
            failed = error
    raise failed


@lru_cache(1)
def _tls() -> ssl.SSLContext:
    """The system's certificates, and those of certifi where it is installed: some Pythons come without any."""
    context = ssl.create_default_context()
    try:
        import certifi

        context.load_verify_locations(certifi.where())
    except (ImportError, OSError):
        pass
    return context


class _Timed:
    """What http.client needs of a socket. Each step has what is left of the whole time: trickling does not help."""

    def __init__(self, plain: socket.socket, clock: _Clock) -> None:
        self._plain, self._clock = plain, clock

    def sendall(self, content: bytes) -> None:
        self._plain.settimeout(self._clock.left())
        self._plain.sendall(content)

    def makefile(self, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._plain, self._clock))

    def close(self) -> None:
        """Do nothing: http.client closes before it has read all, and whoever opened the socket closes it."""


class _Reader(io.RawIOBase):
    def __init__(self, plain: socket.socket, clock: _Clock) -> None:
        self._plain, self._clock = plain, clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._plain.settimeout(self._clock.left())
        return self._plain.recv_into(buffer)
