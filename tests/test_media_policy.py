"""What media and addresses may cost and reach: the same bounds and lines in library, command line and server."""

from __future__ import annotations

import base64
import io
import os
import socket
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmhub.errors import InputError, UsageError
from mmhub.interfaces import Policy, raw_bytes
from mmhub.interfaces import fetch as fetching
from mmhub.interfaces.apart import Allowance, decode_apart
from mmhub.interfaces.fetch import Place, shown_url
from mmhub.interfaces.raw import Bounds, is_url, worker_of
from tests import hostile_decoders
from tests.conftest import flac, png

PUBLIC, OTHER = "93.184.216.34", "2606:2800:220:1::1"
NAMES = {
    "public.example": [PUBLIC],
    "both.example": [OTHER, PUBLIC],
    "sub.public.example": [PUBLIC],
    "loop.example": ["127.0.0.1"],
    "mixed.example": [PUBLIC, "10.0.0.7"],
    "metadata.example": ["169.254.169.254"],
    "mapped.example": ["::ffff:192.168.0.1"],
    "nat64.example": ["64:ff9b::a00:7"],
    "nat64-public.example": ["64:ff9b::5db8:d822"],
    "lan.example": ["10.0.0.7"],
    "xn--bcher-kva.example": [PUBLIC],
    "0x7f.example": [PUBLIC],
}
UNKNOWN = "its host is unknown, or not one that may be fetched from"
ODD = "it is no plain address"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A resolver that knows NAMES; -> what it was asked."""
    asked: list[str] = []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        with suppress(OSError):  # as the system's does with numbers of all kinds
            return [(0, 0, 0, "", (socket.inet_ntoa(socket.inet_aton(host)), port))]
        if host not in NAMES:
            raise socket.gaierror(8, "unknown")
        return [(0, 0, 0, "", (address, port)) for address in NAMES[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


GOOD = {
    "http://public.example/a.png": ("public.example", 80, "/a.png", PUBLIC),
    "HTTPS://Public.Example/A.png?x=1&y=%20": ("public.example", 443, "/A.png?x=1&y=%20", PUBLIC),
    "https://public.example": ("public.example", 443, "/", PUBLIC),
    "https://public.example?x": ("public.example", 443, "/?x", PUBLIC),
    "https://public.example./a": ("public.example", 443, "/a", PUBLIC),
    "https://public.example:8443/a#part": ("public.example", 8443, "/a", PUBLIC),
    "https://public.example/a@b:c//d": ("public.example", 443, "/a@b:c//d", PUBLIC),
    "https://xn--bcher-kva.example/a": ("xn--bcher-kva.example", 443, "/a", PUBLIC),
    "https://both.example/a": ("both.example", 443, "/a", OTHER),
    "https://nat64-public.example/a": ("nat64-public.example", 443, "/a", "64:ff9b::5db8:d822"),
    "https://0x7f.example/a": ("0x7f.example", 443, "/a", PUBLIC),
    f"http://{PUBLIC}/a": (PUBLIC, 80, "/a", PUBLIC),
    f"http://[{OTHER}]:8080/a": (f"[{OTHER}]", 8080, "/a", OTHER),
}
BAD = {
    # addresses of this machine and of the networks it stands in
    "http://127.0.0.1/a": UNKNOWN,
    "http://127.8.9.1/a": UNKNOWN,
    "http://localhost/a": UNKNOWN,
    "http://loop.example/a": UNKNOWN,
    "http://0.0.0.0/a": UNKNOWN,
    "http://10.0.0.7/a": UNKNOWN,
    "http://172.16.3.4/a": UNKNOWN,
    "http://192.168.0.1/a": UNKNOWN,
    "http://100.64.0.1/a": UNKNOWN,
    "http://169.254.169.254/latest/meta-data": UNKNOWN,
    "http://metadata.example/a": UNKNOWN,
    "http://mixed.example/a": UNKNOWN,
    "http://224.0.0.1/a": UNKNOWN,
    "http://240.0.0.1/a": UNKNOWN,
    "http://255.255.255.255/a": UNKNOWN,
    "http://192.0.2.1/a": UNKNOWN,
    "http://192.88.99.1/a": UNKNOWN,
    "http://192.0.0.192/latest/meta-data": UNKNOWN,  # which ipaddress calls global in some versions
    "http://198.18.0.1/a": UNKNOWN,
    "http://168.63.129.16/a": UNKNOWN,  # of Azure, to its own machines alone
    "http://[64:ff9b::a83f:8110]/a": UNKNOWN,
    "http://[::ffff:168.63.129.16]/a": UNKNOWN,
    "http://[::1]/a": UNKNOWN,
    "http://[::]/a": UNKNOWN,
    "http://[fe80::1]/a": UNKNOWN,
    "http://[fd00:ec2::254]/a": UNKNOWN,
    "http://[ff02::1]/a": UNKNOWN,
    "http://[::ffff:127.0.0.1]/a": UNKNOWN,
    "http://[::ffff:7f00:1]/a": UNKNOWN,
    "http://[::127.0.0.1]/a": UNKNOWN,
    "http://[64:ff9b::7f00:1]/a": UNKNOWN,
    "http://[64:ff9b:1::808:808]/a": UNKNOWN,
    "http://[2002:7f00:1::]/a": UNKNOWN,
    "http://[2001:0:808:808::]/a": UNKNOWN,
    "http://[2001:db8::1]/a": UNKNOWN,
    "http://mapped.example/a": UNKNOWN,
    "http://nat64.example/a": UNKNOWN,
    # IPv4 addresses spelt in other ways
    "http://2130706433/a": UNKNOWN,
    "http://0x7f000001/a": UNKNOWN,
    "http://0x7f.1/a": UNKNOWN,
    "http://0177.0.0.1/a": UNKNOWN,
    "http://127.1/a": UNKNOWN,
    "http://127.0.0.01/a": UNKNOWN,
    "http://1572395042/a": UNKNOWN,  # even where it is a public one
    "http://0x5d.184.216.34/a": UNKNOWN,
    "http://1.1.1.1.1/a": UNKNOWN,
    "http://127.0.0.1./a": UNKNOWN,
    # hosts that nobody knows
    "http://nobody.example/a": UNKNOWN,
    # addresses that two readers may read differently
    "http://public.example\\@127.0.0.1/a": "holds a login",
    "http://public.example\\.evil/a": ODD,
    "http://127.0.0.1\\@public.example/a": "holds a login",
    "http://user:pw@public.example/a": "holds a login",
    "http://public.example@127.0.0.1/a": "holds a login",
    "http://public.example%2f@127.0.0.1/a": "holds a login",
    "http://public.example/a b": ODD,
    "http://public.example/a\r\nHost: x": ODD,
    "http://public.example\t/a": ODD,
    " http://public.example/a": ODD,
    "http://public.example/a\x00": ODD,
    "http://public.example/ä": ODD,
    "http://ⓛocalhost/a": ODD,
    "http://127。0。0。1/a": ODD,
    "http://public.exa%6dple/a": ODD,
    "http:///a": ODD,
    "http://": ODD,
    "http:public.example/a": ODD,
    "http://[::1%25lo]/a": ODD,
    "http://[127.0.0.1]/a": UNKNOWN,
    "http://[::1/a": ODD,
    "http://public..example/a": ODD,
    "http://.public.example/a": ODD,
    f"http://public.example/{'a' * 9000}": "more than 8192 characters",
    # ports and schemes
    "http://public.example:22/a": "port 22 is not",
    "http://public.example:0/a": "port 0 is not",
    "http://public.example:99999/a": "port 99999 is not",
    "http://public.example:/a": ODD,
    "ftp://public.example/a": "its scheme is none of https, http",
    "file:///etc/passwd": ODD,
    "file://localhost/etc/passwd": "its scheme is none of https, http",
    "gopher://public.example/a": "its scheme is none of https, http",
    "data:image/png;base64,AAAA": "data URLs are not read here",
}


@pytest.mark.parametrize("url", GOOD)
def test_an_address_of_a_public_host_is_understood(url: str, names: list[str]) -> None:
    place = Place.of(url, Policy(urls=True))
    assert (place.host, place.port, place.target, place.addresses[0]) == GOOD[url]


@pytest.mark.parametrize("url", BAD)
def test_no_other_address_is_asked(url: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it was connected to"))
    with pytest.raises(InputError, match=BAD[url]) as caught:
        fetching.fetch(url, Policy(urls=True))
    assert "\n" not in str(caught.value) and "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("hosts", "url", "allowed"),
    [
        (["public.example"], "http://public.example/a", True),
        (["PUBLIC.example"], "http://public.example:22/a", True),
        (["*.public.example"], "http://sub.public.example/a", True),
        (["*.public.example"], "http://public.example/a", False),
        (["*.lic.example"], "http://public.example/a", False),
        (["public.example"], "http://both.example/a", False),
        (["*"], "http://both.example/a", True),
        (["*"], "http://loop.example/a", False),
        (["lan.example"], "http://lan.example/a", False),  # whoever owns the name would choose the address
        (["10.0.0.7"], "http://lan.example/a", True),
        (["10.0.0.7"], "http://10.0.0.7/a", True),
        (["10.0.0.7"], "http://10.0.0.8/a", False),
        (["10.0.0.0/8"], "http://lan.example/a", True),
        (["10.0.0.0/8"], "http://public.example/a", False),
        (["10.0.0.0/8"], "http://mixed.example/a", False),
        (["mixed.example", "10.0.0.0/8"], "http://mixed.example/a", True),
        (["localhost"], "http://loop.example/a", True),
        (["::1"], "http://[::1]/a", True),
        (PUBLIC, f"http://{PUBLIC}/a", True),
    ],
)
def test_hosts_that_are_listed_are_the_only_ones(hosts: Any, url: str, allowed: bool, names: list[str]) -> None:
    policy = Policy(urls=hosts)
    assert policy.urls is True
    if allowed:
        assert Place.of(url, policy)
        return
    with pytest.raises(fetching._Failed, match=UNKNOWN):
        Place.of(url, policy)


@pytest.mark.parametrize("host", ["http://a.example", "a.*.example", "*a.example", "a/b", "", "1.2.3", "10.0.0.1/8"])
def test_what_is_no_host_is_refused_where_it_is_listed(host: str) -> None:
    with pytest.raises(UsageError, match="is no host to fetch from"):
        Policy(urls=[host])


def test_private_networks_are_fetched_from_where_the_policy_says_so(names: list[str]) -> None:
    assert Place.of("http://lan.example/a", Policy(urls=True, private=True)).addresses == ("10.0.0.7",)
    with pytest.raises(fetching._Failed):
        Place.of("http://lan.example/a", Policy(urls=["public.example"], private=True))


# --- a server that is asked --------------------------------------------------------------------------------------


@dataclass
class Site:
    """A server on loopback: what it answers by path, and what it was asked."""

    port: int = 0
    answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def says(self, path: str, body: bytes = b"", status: int = 200, stated: int | None = None, **headers: str) -> str:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.send_header("Content-Length", str(len(body) if stated is None else stated))
            handler.end_headers()
            handler.wfile.write(body)

        self.answers[path] = answer
        return self.url(path)


@pytest.fixture
def site() -> Iterator[Site]:
    found = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append((self.path, dict(self.headers)))
            with suppress(OSError):  # the other side has gone
                found.answers[self.path](self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        found.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield found
        server.shutdown()


LOCAL = Policy(urls=["127.0.0.1"], fetch_seconds=10, max_bytes=100_000)


def refused(url: str, policy: Policy = LOCAL) -> str:
    with pytest.raises(InputError) as caught:
        raw_bytes(url, policy)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_fetched_is_what_is_there_and_nothing_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens there
    content = png(1)
    assert raw_bytes(site.says("/a.png?x=1", content), LOCAL) == content
    ((path, headers),) = site.asked
    assert path == "/a.png?x=1" and set(headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding", "Connection"}
    assert headers["Accept-Encoding"] == "identity" and headers["Host"] == f"127.0.0.1:{site.port}"


def test_fetching_is_off_unless_it_is_allowed(site: Site) -> None:
    url = site.says("/a.png", png(1))
    assert refused(url, Policy()) == f"'{url}' is a URL, and fetching is off; download the file, or pass --allow-urls"
    assert UNKNOWN in refused(url, Policy(urls=True))
    assert site.asked == []


def test_what_is_not_there_or_too_much_is_refused(site: Site) -> None:
    assert "it answered 404" in refused(site.says("/404?key=planted", b"secret", 404))
    assert "planted" not in refused(site.url("/404?key=planted")) and "secret" not in refused(
        site.url("/404?key=planted")
    )
    assert "it answered 204" in refused(site.says("/204", status=204))
    assert "200000 bytes, more than the limit of 100000" in refused(site.says("/big", stated=200_000))
    assert "99 of 100 bytes came" in refused(site.says("/cut", bytes(99), stated=100))
    assert "compressed form" in refused(site.says("/gz", zlib.compress(bytes(10)), Content_Encoding="gzip"))
    assert "is empty" in refused(site.says("/empty"))

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            handler.wfile.write(b"1000\r\n" + bytes(4096) + b"\r\n")

    site.answers["/endless"] = endless
    assert "more bytes than the limit of 100000" in refused(site.url("/endless"))

    def nonsense(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"\x00\xff" * 100_000)

    site.answers["/nonsense"] = nonsense
    assert "the connection failed" in refused(site.url("/nonsense"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert "the connection failed" in refused(f"http://127.0.0.1:{free.getsockname()[1]}/a")


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b""])
def test_whoever_trickles_is_cut_off_in_time(start: bytes, site: Site) -> None:
    ended = threading.Event()

    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(start)
        while not ended.wait(0.02):
            handler.wfile.write(b"a")

    site.answers["/slow"] = trickle
    since = time.monotonic()
    line = refused(site.url("/slow"), Policy(urls=["127.0.0.1"], fetch_seconds=0.200004))
    ended.set()
    assert "it took longer than 0.2 s" in line and time.monotonic() - since < 5


def test_whoever_looks_a_name_up_slowly_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(20) and [])
    since = time.monotonic()
    line = refused("http://slow.example/a", Policy(urls=True, fetch_seconds=0.1))
    ended.set()
    assert "it took longer than 0.1 s" in line and time.monotonic() - since < 5


def test_redirects_are_followed_up_to_a_number(site: Site) -> None:
    end = site.says("/end", b"there")
    for number in range(7):
        site.says(
            f"/{number}", status=(301, 302, 303, 307, 308)[number % 5], Location=f"{number - 1}" if number else end
        )
    assert raw_bytes(site.url("/4"), LOCAL) == b"there"
    assert "it leads on more than 5 times" in refused(site.url("/6"))
    site.says("/around", status=302, Location="/around")
    assert "it leads on more than 5 times" in refused(site.url("/around"))


@pytest.fixture
def public(site: Site, names: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the public address of NAMES be that of the server; -> addresses that were connected to."""
    connected: list[str] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address[0])
        plain = socket.socket()
        plain.settimeout(timeout)
        plain.connect(("127.0.0.1", site.port))
        return plain

    monkeypatch.setattr(socket, "create_connection", connect)
    return connected


def test_an_address_that_does_not_answer_leaves_time_for_the_others(
    site: Site, public: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.says("/a", b"there")
    connect, times = socket.create_connection, []

    def dead(address: tuple[str, int], timeout: float) -> socket.socket:
        times.append(timeout)
        if address[0] == OTHER:
            raise TimeoutError
        return connect(address, timeout)

    monkeypatch.setattr(socket, "create_connection", dead)
    assert raw_bytes("http://both.example/a", Policy(urls=True, fetch_seconds=20)) == b"there"
    assert times[0] <= 10 < times[1] <= 20


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("http://127.0.0.1/secret", UNKNOWN),
        ("http://lan.example/secret", UNKNOWN),
        ("//metadata.example/secret", UNKNOWN),
        ("http://nobody.example/secret", UNKNOWN),
        ("http://user:pw@public.example/secret", "holds a login"),
        ("http://public.example\\@127.0.0.1/secret", "holds a login"),
        ("file:///etc/passwd", ODD),
        ("ftp://public.example/secret", "its scheme is none of"),
        ("data:,secret", "data URLs"),
    ],
)
def test_a_public_host_cannot_lead_inside(target: str, says: str, site: Site, public: list[str]) -> None:
    site.says("/a", status=302, Location=target)
    line = refused("http://public.example/a", Policy(urls=True))
    assert says in line
    assert line.startswith("cannot fetch 'http://public.example/a': ") and "secret" not in line
    assert [path for path, _ in site.asked] == ["/a"]


def test_the_address_that_was_checked_is_the_one_that_is_asked(
    site: Site, public: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that has a public address when it is checked and another one right after (DNS rebinding)."""
    site.says("/a", b"there")
    answers = iter([[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]])

    def turning(host: str, port: int, **_: Any) -> list[Any]:
        return [(0, 0, 0, "", (address, port)) for address in next(answers)]

    monkeypatch.setattr(socket, "getaddrinfo", turning)
    assert raw_bytes("http://turning.example/a", Policy(urls=True)) == b"there"
    assert public == [PUBLIC]
    assert site.asked[0][1]["Host"] == "turning.example"
    assert UNKNOWN in refused("http://turning.example/a", Policy(urls=True))


def certificate(name: str, folder: Path) -> Path:
    """A certificate that vouches for itself, with its key."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(who).issuer_name(who).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    file = folder / "server.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM) + secret)
    return file


def test_a_certificate_must_be_that_of_the_name(
    tmp_path: Path, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = certificate("public.example", tmp_path)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/down" else 200)
            self.send_header("Location", "http://public.example/a")
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"there")

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

        def connect(_: Any, timeout: float) -> socket.socket:
            plain = socket.socket()
            plain.connect(("127.0.0.1", server.server_address[1]))
            return plain

        monkeypatch.setattr(socket, "create_connection", connect)
        assert "its certificate is not valid" in refused("https://public.example/a", Policy(urls=True))
        monkeypatch.setattr(fetching, "_tls", lambda: ssl.create_default_context(cafile=str(pem)))
        assert raw_bytes("https://public.example/a", Policy(urls=True)) == b"there"
        assert "its certificate is not valid" in refused("https://both.example/a", Policy(urls=True))
        assert "from https to http" in refused("https://public.example/down", Policy(urls=True))
        server.shutdown()


def test_an_address_is_none_where_a_path_is_meant() -> None:
    assert all(map(is_url, ("http://a", "HTTP://a", "file:///a", "data:,a", "data:image/png;base64,AA")))
    assert not any(map(is_url, ("a/b.png", "C:/a", "C:\\a", "a:b", "data: a", Path("http://a"), b"http://a", None)))
    assert shown_url("http://a:b@c/d?e#f") == "http://c/d" and shown_url("data:secret") == "data:..."


@pytest.mark.parametrize(
    "login",
    [
        *("ada:pass", "ada:pass/word", "ada:pass?word", "ada:pass#word", "ada:pass/word?word", "ada:pass@word"),
        *("pass/word", "ada:1/pass", "ada:1?pass", "ada:pass@word/word?word", "ada:pass?word@word/word"),
        "ada:pass\nword",
    ],
)
def test_a_login_is_never_shown(login: str) -> None:
    for url in (f"http://{login}@h.example/x", f"//{login}@h.example/x?a=b", f"HTTP://{login}@h.example?{login}@h"):
        shown = shown_url(url)
        assert not [part for part in ("ada", "pass", "word") if part in shown], shown
    assert shown_url("http://ada:pass@h.example:80/x?word") == "http://h.example:80/x"
    assert shown_url("http://h.example/@ada/x") == "http://...@ada/x"  # which might have been one


# --- decoding in a process of its own ----------------------------------------------------------------------------

BOUNDS = Bounds(memory=2**30, seconds=20, workers=1)
SHORT = Bounds(memory=2**30, seconds=0.5, workers=1)
unix = pytest.mark.skipif(os.name != "posix", reason="its limits are those of POSIX")


def apart(decoder: Any, content: bytes = b"\1\2", bounds: Bounds | None = BOUNDS, **settings: Any) -> list[Any]:
    return list(decode_apart(decoder, content, "'some.png'", Policy(max_pixels=99), bounds, **settings))


def test_a_decoder_gives_the_same_here_and_apart() -> None:
    for bounds in (None, BOUNDS):
        facts, numbers = apart(hostile_decoders.doubled, bounds=bounds, times=3)
        assert facts == {"size": 2, "pixels": 99}
        assert numbers.dtype == np.uint8 and numbers.tolist() == [3, 6]


@pytest.mark.parametrize(
    ("decoder", "bounds", "says"),
    [
        pytest.param("crash", BOUNDS, "within 1024 MiB and 20 s: its decoder died", id="a crash"),
        pytest.param("hang", SHORT, "within 0.5 s", id="sleep"),
        pytest.param("spin", SHORT, "within 0.5 s", id="a busy loop"),
        pytest.param("hoard", BOUNDS, "within 1024 MiB; make it smaller", id="memory", marks=unix),
        pytest.param("fail", BOUNDS, "its decoder died", id="a bug"),
        pytest.param("drip", SHORT, "within 0.5 s", id="an answer that never ends"),
        pytest.param("chatter", BOUNDS, "answered nonsense", id="facts that never end"),
        pytest.param("crumble", BOUNDS, "answered nonsense", id="empty arrays that never end", marks=pytest.mark.slow),
        pytest.param("shout", SHORT, "could not be decoded", id="no messages"),
    ],
)
def test_a_decoder_that_dies_or_hangs_costs_one_input(decoder: str, bounds: Bounds, says: str) -> None:
    since = time.monotonic()
    with pytest.raises(InputError, match=r"'some\.png' could not be decoded") as caught:
        apart(getattr(hostile_decoders, decoder), b"\xff" * 64, bounds)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - since < 15
    assert apart(hostile_decoders.doubled)[1].tolist() == [2, 4], "the next one works"


@pytest.mark.parametrize(
    ("head", "size"),
    [
        ({"shape": [4], "kind": "object"}, 4),
        ({"shape": [4], "kind": "uint8"}, 5),
        ({"shape": [-4], "kind": "uint8"}, 4),
        ({"shape": [True], "kind": "uint8"}, 1),
        ({"shape": [], "kind": "uint8"}, 1),
        ({"shape": [1, 1, 1, 1], "kind": "uint8"}, 1),
        ({"shape": [10**6], "kind": "float32"}, 4),
        ({"shape": "4", "kind": "uint8"}, 4),
        ({"shape": [4], "kind": []}, 4),
        ({"shape": [2**26 + 1], "kind": "uint8"}, 2**26 + 1),  # more than the pixels and seconds allowed can be
        ({"facts": [1]}, 0),
        ({"facts": {}}, 1),
        ({}, 0),
    ],
)
def test_what_a_decoder_says_is_taken_for_a_strangers(head: Any, size: int) -> None:
    left = Allowance(Policy(max_pixels=100, max_seconds=1e-9))
    with pytest.raises(InputError, match=r"'some\.png' could not be decoded: its decoder answered nonsense"):
        left.take(head, bytearray(size), "'some.png'")
    found = Allowance(Policy()).take({"shape": [1, 2], "kind": "uint8"}, bytearray(2), "")
    assert isinstance(found, np.ndarray) and found.shape == (1, 2)


def test_no_more_is_taken_from_a_decoder_than_the_policy_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub.interfaces import apart as module

    asked, read = [], module.read_message
    monkeypatch.setattr(module, "read_message", lambda file, most: asked.append(most) or read(file, most))
    apart(hostile_decoders.doubled, b"\1\2\3", bounds=BOUNDS)
    most = 4 * Policy().max_samples
    assert asked[-3:] == [most, most, most - 3]


@pytest.mark.parametrize("head", [[1], {"shape": [3], "kind": "uint8"}])
def test_a_decoder_that_lies_is_replaced(head: Any) -> None:
    with pytest.raises(InputError, match="could not be decoded"):
        apart(hostile_decoders.lie, head=head, size=0)
    assert apart(hostile_decoders.doubled)[1].tolist() == [2, 4]


def test_the_words_of_a_decoder_become_one_short_line() -> None:
    with pytest.raises(InputError) as caught:
        apart(hostile_decoders.lie, head={"error": "a\nb\x1b[31m" + 2000 * "c", "hint": ""}, size=0)
    assert caught.value.message.startswith("a?b?[31mccc") and len(caught.value.message) == 500


def test_a_decoder_has_no_secrets_no_files_and_no_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted")
    monkeypatch.setenv("MMHUB_SERVE_KEYS", "planted")
    bounds = Bounds(memory=2**30, seconds=21, workers=1)  # started after that
    with socket.socket() as open_one:
        os.set_inheritable(open_one.fileno(), True)
        (found,) = apart(hostile_decoders.tell, bounds=bounds)
    assert not [name for name in found["environment"] if "TOKEN" in name or name.startswith(("HF_", "MMHUB_"))]
    assert found["files"] == 3 and found["folder"] == os.path.abspath(os.sep)  # two pipes, and nowhere
    assert found["modules"] == []


@unix
def test_a_decoder_writes_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its decoder died"):
        apart(hostile_decoders.write, folder=str(tmp_path))
    assert not (tmp_path / "written").exists() or not (tmp_path / "written").read_bytes()


@pytest.mark.slow
def test_those_who_wait_too_long_for_a_decoder_are_told() -> None:
    first: Any = decode_apart(hostile_decoders.doubled, b"\1", "'a'", Policy(), SHORT)
    assert next(first) == {"size": 1, "pixels": 50_000_000}
    with pytest.raises(InputError, match="all 1 decoders are busy"):
        apart(hostile_decoders.doubled, bounds=SHORT)
    first.close()  # half-way: that process is not used again
    assert apart(hostile_decoders.doubled, bounds=SHORT)[1].tolist() == [2, 4]


@pytest.mark.slow
def test_many_threads_share_the_decoders() -> None:
    bounds, wrong = Bounds(workers=2), []

    def decode(number: int) -> None:
        for _ in range(20):
            (_, found) = apart(hostile_decoders.doubled, bytes([number]), bounds)
            wrong.extend([] if found.tolist() == [2 * number] else [number])

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_was_fetched_is_decoded_apart_and_own_files_are_not() -> None:
    assert worker_of("a.png", Policy()) is worker_of(b"a", Policy()) is None
    assert worker_of({"bytes": b"a", "path": "a.png"}, Policy()) is None
    assert worker_of({"bytes": b"a", "path": "http://a/b"}, Policy()) == Bounds()
    assert worker_of("http://a/b", Policy()) == worker_of({"path": "http://a/b"}, Policy()) == Bounds()
    assert worker_of("a.png", Policy(worker=SHORT)) is SHORT


# --- media that are made to harm ---------------------------------------------------------------------------------


def chunked_png(*chunks: tuple[bytes, bytes], side: int = 8, promised: int = 0) -> bytes:
    pixels = zlib.compress((b"\0" + bytes(3 * side)) * side)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", promised or side, promised or side, 8, 2, 0, 0, 0)),
        *chunks,
        (b"IDAT", pixels),
        (b"IEND", b""),
    ]
    made = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def encoded_sound(samples: Any, rate: int, kind: str) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype="FLOAT" if kind == "WAV" else None)
    return file.getvalue()


def flac_promising(frames: int) -> bytes:
    """A small file of 8 channels whose header promises so many frames."""
    content = bytearray(encoded_sound(np.zeros((9000, 8), np.int16), 48_000, "FLAC"))
    content[21:26] = (content[21] & 0xF0 | frames >> 32, *frames.to_bytes(5)[1:])  # 36 bits of STREAMINFO
    return bytes(content)


BOMB = zlib.compress(bytes(4 * 2**20))
NAN = np.array([0.5, np.nan, 0.1], np.float32)
HOSTILE: dict[str, tuple[str, bytes, str]] = {
    "a picture of 30000x30000": ("image", chunked_png(promised=30_000), "pixels"),
    "a text in a picture that grows": ("image", chunked_png((b"zTXt", b"a\0\0" + BOMB)), "damaged"),
    "half a picture": ("image", png(1, 64)[:-400], "damaged"),
    "a sound for a picture": ("image", flac(1), "is not an image"),
    "PostScript for a picture": ("image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
    "an archive for a picture": ("image", b"PK\3\4" + png(1), "is not an image"),
    "a picture for a sound": ("audio", png(1), "as audio"),
    "half a sound": ("audio", flac(1)[:30], "as audio"),
    "a sound that grows": ("audio", flac_promising(20_000_000), "would grow"),
    "a sound of 40 channels": ("audio", encoded_sound(np.zeros((9, 40), np.float32), 8000, "WAV"), "40 channels"),
    "a sound of 11 minutes": ("audio", encoded_sound(np.zeros(660_000, np.int16), 1000, "FLAC"), "more than the limit"),
    "a sound of no numbers": ("audio", encoded_sound(NAN, 8000, "WAV"), "not finite"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    from mmhub.build import compose

    return compose(
        encoders={
            "image": {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32}},
            "audio": {"use": "cnn", "config": {"sample_rate": 8000, "dim": 16, "channels": [4, 8]}},
        },
        fusion={"use": "attention", "config": {"dim": 16, "depth": 1, "heads": 2}},
        decoder={"use": "classification", "config": {"labels": ["no", "yes"]}},
    ).eval()


@pytest.mark.parametrize("worker", [None, BOUNDS], ids=["here", "apart"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_media_are_one_line_here_and_apart(kind: str, worker: Bounds | None, model: Any) -> None:
    modality, content, says = HOSTILE[kind]
    with pytest.raises(InputError, match=says) as caught:
        model.predict([{modality: content}], policy=Policy(worker=worker))
    assert (
        caught.value.message.startswith(f"sample 0, {modality}: {len(content)} bytes") or says in caught.value.message
    )
    assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)


def test_media_are_read_the_same_here_and_apart(model: Any) -> None:
    stereo = encoded_sound(np.random.default_rng(0).normal(0, 0.1, (5000, 3)), 44_100, "OGG")
    samples = [{"image": png(1), "audio": flac(2)}, {"image": png(3, 200)}, {"audio": stereo}]
    here, there = (model.predict(samples, policy=Policy(worker=worker)) for worker in (None, BOUNDS))
    assert here == there
    from mmhub_audio.decode import decode, measure

    for raw in (stereo, flac(2)):
        ours, theirs = (decode(raw, Policy(worker=worker)) for worker in (None, BOUNDS))
        assert ours.rate == theirs.rate and ours.samples.equal(theirs.samples)
        assert measure(raw, Policy()) == measure(raw, Policy(worker=BOUNDS))


def test_long_sounds_come_from_apart_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub_audio import decode

    monkeypatch.setattr(decode, "_HELD", 1000)
    content = encoded_sound(np.random.default_rng(0).normal(0, 0.1, 200_000), 44_100, "FLAC")
    sound = decode.open_sound(content, Policy(worker=BOUNDS))
    pieces = list(sound.blocks)
    assert len(pieces) > 2
    np.testing.assert_array_equal(np.concatenate(pieces), decode.decode(content, Policy()).samples)


def processes(bounds: Bounds) -> list[int]:
    """Numbers of those that are idle."""
    from mmhub.interfaces.apart import _pool

    return [worker._process.pid for worker in _pool(bounds)._idle]


def test_a_decoder_that_has_answered_is_used_again(model: Any) -> None:
    from mmhub.explain.places import picture_size
    from mmhub.explain.sources import picture_of, wave_of
    from mmhub_audio.decode import decode, measure
    from mmhub_image.decode import open_image

    policy = Policy(worker=BOUNDS)
    assert measure(flac(1), policy)
    before = processes(BOUNDS)
    assert len(before) == 1
    for read, raw in ((measure, flac(1)), (decode, flac(1)), (wave_of, flac(1)), (open_image, png(1))):
        assert read(raw, policy) is not None
        assert processes(BOUNDS) == before, read
    assert picture_size(png(1), policy) and picture_of(png(1), policy, 9)
    assert processes(BOUNDS) == before


def test_the_size_of_a_picture_is_told_within_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from mmhub.explain.places import picture_size

    turned, file = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6
    Image.new("RGB", (3, 2)).save(file, "JPEG", exif=turned)
    assert picture_size(file.getvalue(), Policy()) == (2, 3)
    with pytest.raises(InputError, match="more than 5 pixels"):
        picture_size(file.getvalue(), Policy(max_pixels=5))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was decoded here"))
    assert picture_size(file.getvalue(), Policy(worker=BOUNDS)) == (2, 3)


def endless_flac(samples: Any, rate: int) -> bytes:
    """A file that does not say how many samples it has, as one that was written to a pipe."""
    content = bytearray(encoded_sound(samples, rate, "FLAC"))
    content[21:26] = content[21] & 0xF0, 0, 0, 0, 0
    return bytes(content)


def test_a_sound_of_unknown_length_holds_no_decoder() -> None:
    from mmhub_audio.decode import decode, open_sound

    noise = np.random.default_rng(0).normal(0, 0.1, 100_000)
    content = endless_flac(noise, 192_000)
    first = open_sound(content, Policy(worker=SHORT))
    assert first.frames is None
    second = decode(content, Policy(worker=SHORT))
    assert np.concatenate(list(first.blocks)).tolist() == second.samples.tolist() and len(second.samples) == len(noise)


def test_sounds_of_high_rates_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub_audio.decode import decode
    from mmhub_audio.files import check_header

    for rate, seconds in ((8_000, 600), (48_000, 600), (96_000, 300), (192_000, 150), (655_350, 43)):
        check_header("a.flac", rate * seconds, rate, 1, Policy())
    for seconds in (1.0, 60.0):
        check_header("a.flac", int(192_000 * seconds), 192_000, 2, Policy(max_seconds=seconds))
    with pytest.raises(InputError, match=r"lasts 600.0 s, more than the limit of 43.9 s at 655350 Hz; .* lower its"):
        check_header("a.flac", 655_350 * 600, 655_350, 1, Policy())
    monkeypatch.setattr("mmhub.interfaces.raw._SAMPLES", 1000)
    with pytest.raises(InputError, match=r"lasts more than the limit of 1.5 s at 192000 Hz"):
        decode(endless_flac(np.zeros(300_000), 192_000), Policy(max_seconds=6))


def test_a_file_grows_in_proportion_or_little(model: Any) -> None:
    flat = chunked_png(side=200)
    assert len(model.predict([{"image": flat}])) == 1
    with pytest.raises(InputError, match=r"would grow from \d+ to 120000 bytes when decoded; more than 20 times"):
        model.predict([{"image": flat}], policy=Policy(max_ratio=20, ratio_floor=1000))
    with pytest.raises(InputError, match="has 2 channels, more than the limit of 1"):
        model.predict([{"audio": encoded_sound(np.zeros((9000, 2)), 8000, "WAV")}], policy=Policy(max_channels=1))


# --- command line and server -------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from mmhub.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return run


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "both"
    model.save(folder)
    return folder


def test_the_command_line_refuses_hostile_media_in_one_line(command: Any, saved: Path, tmp_path: Path) -> None:
    for number, (modality, content, says) in enumerate(HOSTILE.values()):
        file = tmp_path / f"{number}.file"
        file.write_bytes(content)
        code, out, err = command("predict", saved, f"--{modality}", file.name)
        lines = [line for line in err.splitlines() if not line.startswith("hint:")]
        assert (code, out, len(lines)) == (1, "", 1), err
        assert says in err and file.name in err


def test_the_command_line_fetches_what_it_is_allowed_to(command: Any, saved: Path, site: Site, tmp_path: Path) -> None:
    url = site.says("/a.png", png(1))
    (tmp_path / "a.png").write_bytes(png(1))
    assert "--allow-urls" in command("predict", saved, "--image", url)[2]
    assert UNKNOWN in command("predict", saved, "--image", url, "--allow-urls")[2]
    assert UNKNOWN in command("predict", saved, "--image", url, "--allow-host", "example.org")[2]
    assert command("predict", saved, "--image", url, "--allow-host", "a/b")[0] == 2
    assert site.asked == []
    found = command("predict", saved, "--image", url, "--allow-host", "127.0.0.1", "--json")
    assert found == command("predict", saved, "--image", "a.png", "--json") and found[0] == 0


@pytest.mark.slow
def test_hosts_are_those_of_data_too(command: Any, saved: Path, site: Site, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"image,label\n{site.says('/a.png', png(1))},no\n")
    options = ("--data", "rows.csv", "--inputs", "image=image", "--target-column", "label")
    assert UNKNOWN in command("eval", saved, *options, "--allow-urls")[2]
    assert command("eval", saved, *options, "--allow-host", "127.0.0.0/8")[0] == 0


def test_a_recipe_names_hosts_or_says_yes_or_no() -> None:
    from mmhub.config import check_recipe

    def policy(value: Any) -> Policy:
        table = {"task": "classification", "data": {"train": "a.csv", "target": "label", "allow_urls": value}}
        return Policy(urls=check_recipe(table).data.allow_urls)

    assert policy(False) == Policy() and policy(True) == Policy(urls=True)
    assert policy(["*.example.org"]) == Policy(urls=True, hosts=("*.example.org",)) and policy([]) == Policy()
    with pytest.raises(UsageError, match="allow_urls"):
        policy(7)


@pytest.mark.slow
def test_a_recipe_says_whether_and_where_from_media_are_fetched(command: Any, tmp_path: Path, site: Site) -> None:
    rows = [f"{site.says(f'/{label}.png', png(label))},{label}" for label in range(2)]
    (tmp_path / "rows.csv").write_text("\n".join(("image,label", *rows)))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'task = "classification"\n[model.encoders.image]\nuse = "timm"\n'
        'config = { architecture = "test_resnet", image_size = 32 }\n[model.decoder]\nuse = "classification"\n'
        '[data]\ntrain = "rows.csv"\ninputs = { image = "image" }\ntarget = "label"\nallow_urls = ["127.0.0.1"]\n'
        "[train]\nepochs = 1\nbatch_size = 2\n"
    )
    for value, says in (
        ("false", "fetching is off"),
        ("true", UNKNOWN),
        ('["a/b"]', "is no host"),
        ("7", "allow_urls"),
    ):
        assert says in command("train", recipe, "--out", "run", "--set", f"data.allow_urls={value}")[2]
    assert site.asked == []
    code, _, err = command("train", recipe, "--out", "other")
    assert code == 0, err
    assert {path for path, _ in site.asked} == {"/0.png", "/1.png"}


def test_the_server_does_not_start_with_what_is_no_host(command: Any, saved: Path) -> None:
    code, _, err = command("serve", saved, "--allow-host", "http://example.org")
    assert code == 2 and "'http://example.org' is no host to fetch from" in err


@pytest.mark.slow
def test_the_server_refuses_hostile_media_in_the_same_words_and_goes_on(model: Any) -> None:
    import httpx

    from tests.serving import serving

    with serving({"both": model}) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for modality, content, says in HOSTILE.values():
            body = {"samples": [{modality: {"base64": base64.b64encode(content).decode()}}]}
            answer = client.post("/predict", json=body)
            assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text
        body = {"samples": [{"image": {"base64": base64.b64encode(png(1)).decode()}}]}
        assert client.post("/predict", json=body).json()["predictions"] == model.predict([{"image": png(1)}])


@pytest.mark.slow
def test_the_server_answers_other_requests_while_it_fetches(model: Any, site: Site) -> None:
    """The quick one: hostile media, what is fetched, and a fetch that lasts, at one server."""
    import httpx

    from mmhub_serve import inputs
    from tests.serving import serving

    content, ended, begun = png(1), threading.Event(), threading.Semaphore(0)

    def slow(handler: BaseHTTPRequestHandler) -> None:
        begun.release()
        ended.wait(20)

    site.answers["/slow"] = slow
    given = {"samples": [{"image": {"base64": base64.b64encode(content).decode()}}]}
    named, waiting = {"samples": [{"image": site.says("/a.png", content)}]}, {"samples": [{"image": site.url("/slow")}]}
    own, answers = model.predict([{"image": content}]), []
    with serving({"both": model}, urls=("127.0.0.1",), decoders=1) as url:
        client = httpx.Client(base_url=url, timeout=30, trust_env=False)
        assert client.post("/predict", json=named).json()["predictions"] == own
        modality, bad, says = next(iter(HOSTILE.values()))
        body = {"samples": [{modality: {"base64": base64.b64encode(bad).decode()}}]}
        assert says in client.post("/predict", json=body).json()["error"]["message"]
        askers = [
            threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/predict", json=waiting, trust_env=False)))
            for _ in range(inputs._SHARE)
        ]
        for asker in askers:
            asker.start()
        assert all(begun.acquire(timeout=20) for _ in askers)
        assert client.post("/predict", json=given).json()["predictions"] == own
        refused = client.post("/predict", json=named)
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        assert "fetches for as many requests as it can" in refused.json()["error"]["message"]
        ended.set()
        for asker in askers:
            asker.join(20)
        assert [answer.status_code for answer in answers] == [400] * inputs._SHARE
        assert client.post("/predict", json=named).json()["predictions"] == own
        client.close()
    assert not inputs._asking


@pytest.mark.slow
def test_the_server_fetches_only_where_it_was_told_to(model: Any, site: Site) -> None:
    import httpx

    from tests.serving import serving

    content = png(1)
    body = {"samples": [{"image": site.says("/a.png", content)}]}
    for urls, says in ((False, "this server fetches no addresses"), (True, UNKNOWN), (("example.org",), UNKNOWN)):
        with (
            serving({"both": model}, urls=urls, decoders=1) as url,
            httpx.Client(base_url=url, trust_env=False) as client,
        ):
            answer = client.post("/predict", json=body)
            assert answer.status_code == 400 and says in answer.json()["error"]["message"]
    assert site.asked == []
    limits: dict[str, Any] = {"urls": ("127.0.0.1",), "decoders": 1, "body": 3 * len(content) // 2}
    with serving({"both": model}, **limits) as url, httpx.Client(base_url=url, trust_env=False) as client:
        assert client.post("/predict", json=body).json()["predictions"] == model.predict([{"image": content}])
        both = {"samples": body["samples"] * 2}  # together more than a request may hold
        assert "more than the limit" in client.post("/predict", json=both).json()["error"]["message"]
