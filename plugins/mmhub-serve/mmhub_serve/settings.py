"""What a server is told: which models, where it listens, and the bounds of what one request may cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmhub.interfaces import Policy
from mmhub.interfaces.raw import Bounds


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one request and of what waits; a request beyond one is refused with a 4xx, never shortened.

    Attributes:
        body: bytes of a request. bodies: bytes of all requests that are being read or answered.
        header: bytes of its first line and headers together. headers: how many. target: bytes of its path and query.
        samples: in one request, and pictures or sounds of all its samples. pixels: of one image. seconds: of one
            recording. tokens: of one text, as the model counts them. new_tokens: that one answer may have at most.
        queue: samples of one model that may wait before others are told 429. waiting: bytes that these may take once
            they are decoded. connections: open ones.
        head_seconds, body_seconds: in which headers and body must have come. answer_seconds: until 503.
        read_seconds: in which a client must take what was sent to it. idle_seconds: between requests of a connection.
        pace: bytes a second that a body must come with. urls: may media be addresses that are fetched, or the hosts
            that they may be fetched from; those of one request have `body` bytes and half a minute together.
        decoders: processes in which media are decoded, 0 = in the server's own, or in one where addresses are fetched.
    """

    body: int = 32 * 2**20
    bodies: int = 512 * 2**20
    header: int = 32 * 2**10
    headers: int = 100
    target: int = 8 * 2**10
    samples: int = 256
    pixels: int = 25_000_000
    seconds: float = 600.0
    tokens: int = 32_768
    new_tokens: int = 4_096
    queue: int = 512
    waiting: int = 2**30
    connections: int = 1_024
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    answer_seconds: float = 300.0
    read_seconds: float = 30.0
    idle_seconds: float = 75.0
    pace: int = 256
    urls: bool | tuple[str, ...] = False
    decoders: int = 2

    def __post_init__(self) -> None:
        """Raise UsageError for a host that is none."""
        assert self.policy

    @property
    def policy(self) -> Policy:
        """What raw inputs of strangers may be: bytes that they sent, no files, and no address unless it is allowed."""
        return Policy(
            paths=False,
            urls=self.urls,
            max_bytes=self.body,
            max_pixels=self.pixels,
            max_seconds=self.seconds,
            worker=Bounds(workers=self.decoders or 1) if self.decoders or self.urls else None,
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One server.

    Attributes:
        models: names as `mmhub.load` takes them. loaded: so many stay in memory, 0 = all. preload: load those at the
            start, not only the first.
        batch: samples that are computed together at most, 1 = batching off. wait: seconds that a sample may wait for
            others to join it. keys: bearer keys that let in, empty = everybody who reaches the address.
        origins: web pages that may ask from a browser (CORS). device, quantize: as of `mmhub.load`.
        certificate: files of a certificate chain and its private key, PEM. behind_proxy: a proxy in front vouches for
            the host name, and says in X-Forwarded-For who asks. grace: seconds that requests have when it is stopped.
        access_log: write a line for each request to stderr.
    """

    models: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    loaded: int = 0
    preload: bool = False
    batch: int = 32
    wait: float = 0.0
    keys: tuple[str, ...] = field(default=(), repr=False)
    origins: tuple[str, ...] = ()
    device: str = "auto"
    quantize: str | None = None
    certificate: tuple[str, str] | None = None
    behind_proxy: bool = False
    grace: float = 30.0
    access_log: bool = False
    limits: Limits = field(default_factory=Limits)
