"""`mmhub serve`."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from mmhub.cli.options import device_option, quantize_option, urls_option
from mmhub.cli.output import json_option, note, quiet_option

F = TypeVar("F", bound=Callable[..., Any])


class _Finite(click.FloatRange):
    """A number in a range; not nan, which is in none, yet below no bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        return found if math.isfinite(found) else self.fail(f"{value} is no finite number", param, ctx)


_COUNT = click.IntRange(min=1)
_SECONDS = _Finite(min=0, min_open=True)
_FILE = click.Path(dir_okay=False, path_type=Path)
# option: (name in Limits, type, default, help); the defaults are those of Limits, which imports PyTorch
_LIMITS: dict[str, tuple[str, Any, Any, str]] = {
    "--queue": ("queue", _COUNT, 512, "Samples of one model that may wait; others are told 429."),
    "--max-samples": ("samples", _COUNT, 256, "Samples of one request."),
    "--max-body": ("body", _COUNT, 32, "MiB of one request."),
    "--max-pixels": ("pixels", _COUNT, 25_000_000, "Pixels of one image."),
    "--max-seconds": ("seconds", _SECONDS, 600.0, "Seconds of one recording."),
    "--max-tokens": ("tokens", _COUNT, 32_768, "Tokens of one text."),
    "--max-new-tokens": ("new_tokens", _COUNT, 4_096, "Tokens that one answer may have."),
    "--max-connections": ("connections", _COUNT, 1_024, "Open connections."),
    "--decode-workers": ("decoders", click.IntRange(min=0), 2, "Processes that decode media; 0 = in the server's own."),
    "--timeout": ("answer_seconds", _SECONDS, 300.0, "Seconds after which a request is answered with 503."),
}


def limit_options(command: F) -> F:
    """Add an option for each limit that a user may want to set, passed on by its name in `Limits`."""
    for option, (name, kind, default, text) in reversed(_LIMITS.items()):
        command = click.option(option, name, type=kind, default=default, show_default=True, help=text)(command)
    return command


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free port.")
@click.option("--key-file", type=_FILE, help="Let in who sends one of these keys, a line each; or $MMHUB_SERVE_KEYS.")
@click.option("--no-keys", is_flag=True, help="Open to everybody who reaches the address, also beyond this machine.")
@click.option("--cors", "origins", multiple=True, metavar="ORIGIN", help="A web page that may ask (repeatable).")
@click.option("--tls-cert", type=_FILE, help="Certificate chain, PEM.")
@click.option("--tls-key", type=_FILE, help="Its private key, PEM.")
@click.option("--behind-proxy", is_flag=True, help="A proxy in front vouches for the host name of requests.")
@click.option("--max-loaded", type=click.IntRange(min=0), default=0, help="Models in memory at a time [default: all].")
@click.option("--preload", is_flag=True, help="Load every model at the start, not only the first.")
@click.option("--max-batch", type=_COUNT, default=32, show_default=True, help="Samples computed together; 1 = one.")
@click.option("--max-wait-ms", type=_Finite(min=0), help="Longest that a sample waits for others to join it.")
@limit_options
@urls_option
@click.option("--grace", type=_Finite(min=0), default=30, show_default=True, help="Seconds to stop in.")
@click.option("--access-log", is_flag=True, help="Write a line for each request to stderr, without secrets.")
@device_option
@quantize_option
@quiet_option
@json_option
def serve(
    names: tuple[str, ...],
    host: str,
    port: int,
    key_file: Path | None,
    no_keys: bool,
    origins: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    behind_proxy: bool,
    max_loaded: int,
    preload: bool,
    max_batch: int,
    max_wait_ms: float | None,
    allow_urls: bool | tuple[str, ...],
    grace: float,
    access_log: bool,
    device: str,
    quantize: str | None,
    quiet: bool,
    as_json: bool,
    **limits: Any,
) -> None:
    """Answer requests to the models NAME over HTTP until Ctrl-C or SIGTERM.

    Programs ask POST /predict, or use any client of OpenAI's API with the base URL http://HOST:PORT/v1. Without keys
    only this machine is served. SIGTERM and Ctrl-C answer what was accepted, then end; a second one ends at once.
    """
    click.get_current_context().with_resource(_stoppable())
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key belong together: give both")
    from mmhub_serve.access import check_address, check_origins, read_keys
    from mmhub_serve.settings import Limits, Settings

    limits |= {"urls": allow_urls, "body": limits["body"] * 2**20}
    limits["bodies"] = max(Limits().bodies, 2 * limits["body"])
    more: dict[str, Any] = {} if max_wait_ms is None else {"wait": max_wait_ms / 1000}
    settings = Settings(
        models=tuple(dict.fromkeys(names)),
        host=host,
        port=port,
        loaded=max_loaded,
        preload=preload,
        batch=max_batch,
        keys=read_keys(key_file),
        origins=check_origins(origins),
        device=device,
        quantize=quantize,
        certificate=(str(tls_cert), str(tls_key)) if tls_cert and tls_key else None,
        behind_proxy=behind_proxy,
        grace=grace,
        access_log=access_log,
        limits=Limits(**limits),
        **more,
    )
    check_address(settings, private=no_keys)
    _run(settings, quiet, as_json)


@contextmanager
def _stoppable() -> Iterator[None]:
    """End at SIGTERM with 0 also while PyTorch is imported, before the server is there to stop."""
    before: Any = None
    with suppress(ValueError):  # not in the main thread
        before = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _run(settings: Any, quiet: bool, as_json: bool) -> None:
    from mmhub_serve.run import listen, start

    start(settings, listen(settings.host, settings.port), lambda url: _tell(url, settings, quiet, as_json))


def _tell(url: str, settings: Any, quiet: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"url": url, "models": settings.models}), flush=True)
    from mmhub_serve.naming import public_names

    called = [name if name == given else f"{name} ({given})" for name, given in public_names(settings.models).items()]
    who = f"whoever has one of {len(settings.keys)} keys" if settings.keys else "everybody who reaches it (no keys)"
    note(f"mmhub serves {', '.join(called)} at {url}, to {who}. Ctrl-C stops it.", quiet)
