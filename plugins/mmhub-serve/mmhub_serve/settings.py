"""What a server is told: which models, where it listens, and the bounds of what one request may cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmhub.interfaces import Policy


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one request and of what waits; a request beyond one is refused with a 4xx, never shortened.

    Attributes:
        body: bytes of a request. header: bytes of its first line and headers together. headers: how many.
        samples: in one request. pixels: of one image. seconds: of one recording. tokens: of one text, as the model
            counts them. new_tokens: that one answer may have at most.
        queue: samples of one model that may wait before others are told 429. connections: open ones.
        head_seconds, body_seconds: in which headers and body must have come. answer_seconds: until 503.
    """

    body: int = 32 * 2**20
    header: int = 32 * 2**10
    headers: int = 100
    samples: int = 256
    pixels: int = 25_000_000
    seconds: float = 600.0
    tokens: int = 32_768
    new_tokens: int = 4_096
    queue: int = 512
    connections: int = 1_024
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    answer_seconds: float = 300.0

    @property
    def policy(self) -> Policy:
        """What raw inputs of strangers may be: bytes that they sent, and nothing they name."""
        return Policy(paths=False, urls=False, max_bytes=self.body, max_pixels=self.pixels, max_seconds=self.seconds)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One server.

    Attributes:
        models: names as `mmhub.load` takes them. loaded: so many stay in memory, 0 = all.
        batch: samples that are computed together at most, 1 = batching off. wait: seconds that a sample may wait for
            others to join it. keys: bearer keys that let in, empty = everybody who reaches the address.
        origins: web pages that may ask from a browser (CORS). device, quantize: as of `mmhub.load`.
    """

    models: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    loaded: int = 0
    batch: int = 32
    wait: float = 0.005
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    device: str = "auto"
    quantize: str | None = None
    limits: Limits = field(default_factory=Limits)
