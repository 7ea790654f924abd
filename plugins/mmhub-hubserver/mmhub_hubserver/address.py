"""How clients reach a hub: by which address, over TLS or a proxy, and therefore whom it may let in without a token."""

import ipaddress
import re
from dataclasses import dataclass
from email.message import Message
from urllib.parse import urlsplit

from mmhub_hubserver.errors import Forbidden

_HOST = re.compile(r"([A-Za-z0-9.\-_]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Address:
    """Where a hub listens (`host`) and what is in front of it.

    `public_url` is how clients write the hub's address, where that is known: without it the `Host` of each request says
    so. `behind_proxy` believes the proxy's `X-Forwarded-Proto`.
    """

    host: str = "127.0.0.1"
    tls: bool = False
    behind_proxy: bool = False
    public_url: str | None = None

    def __post_init__(self) -> None:
        if self.public_url is not None:
            object.__setattr__(self, "public_url", _checked_url(self.public_url))

    @property
    def shared(self) -> bool:
        """Whether people who are not on this machine may reach the hub: then it needs accounts."""
        public = urlsplit(self.public_url or "").hostname
        return self.behind_proxy or not is_loopback(self.host) or (public is not None and not is_loopback(public))

    def check(self, accounts: bool) -> None:
        """Refuse to open a hub to others that is not ready for them.

        Raises:
            ValueError: with what to do.
        """
        what = f"--host {self.host}" if not is_loopback(self.host) else "--behind-proxy or --public-url"
        if self.shared and not accounts:
            raise ValueError(
                f"{what}: without accounts only loopback is served; add one first: mmhub hub user add NAME"
            )
        if not is_loopback(self.host) and not (self.tls or self.behind_proxy):
            raise ValueError(
                f"{what}: without TLS only loopback is served, or tokens could be read on the way; "
                "give --tls-cert and --tls-key, or --behind-proxy if a proxy in front adds TLS"
            )

    def base(self, headers: Message, default: str) -> str:
        """Return the hub's address as the client writes it, `default` where the client does not say.

        Raises:
            Forbidden: a web page caused the request, by posting a form across origins or under a host name that was
                made to lead here. Where TLS or a proxy is in front, they vouch for the name.
        """
        host = headers.get("Host")
        if host is None:
            base = self.public_url or default
        else:
            match = _HOST.fullmatch(host)
            if match is None:
                raise Forbidden("The Host header is not a host name.")
            if not (self.tls or self.behind_proxy or is_loopback(match[1].strip("[]").lower())):
                raise Forbidden("This hub answers to loopback host names only.")
            base = self.public_url or f"{self._scheme(headers)}://{host}"
        origin = headers.get("Origin")
        if origin is not None and origin.lower() != base.lower():
            raise Forbidden("This hub does not answer to other web pages.")
        return base

    def _scheme(self, headers: Message) -> str:
        secure = self.tls or (self.behind_proxy and headers.get("X-Forwarded-Proto", "").strip().lower() == "https")
        return "https" if secure else "http"


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and _HOST.fullmatch(parts.netloc) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(f"--public-url {url}: expected https://NAME or https://NAME:PORT, without a path")
    return f"{parts.scheme}://{parts.netloc.lower()}"
