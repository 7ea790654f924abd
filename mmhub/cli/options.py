"""Options that several commands read: column mappings, devices, permission to fetch URLs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import click

from mmhub.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def device_option(command: F) -> F:
    """Add `--device`."""
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")(command)


def quantize_option(command: F) -> F:
    """Add `--quantize`."""
    kinds = click.Choice(["int8", "int4"])
    return click.option("--quantize", type=kinds, help="Keep a language model's weights in 8 or 4 bits.")(command)


def urls_option(command: F) -> F:
    """Add `--allow-urls` and `--allow-host`, passed on together as `allow_urls`, which `Policy(urls=...)` takes."""

    @wraps(command)
    def call(*args: Any, allow_urls: bool, allow_host: tuple[str, ...], **options: Any) -> Any:
        return command(*args, allow_urls=allow_host or allow_urls, **options)

    flag = click.option("--allow-urls", is_flag=True, help="Fetch inputs that are public http(s) addresses.")
    hosts = click.option(
        "--allow-host",
        multiple=True,
        metavar="HOST",
        help="Fetch, but only from such hosts: example.org, *.example.org; 10.0.0.7 or 10.0.0.0/8 may be private.",
    )
    return cast(F, flag(hosts(call)))


def columns_options(command: F) -> F:
    """Add `--inputs` and `--columns`, how a table feeds the model."""
    inputs = click.option("--inputs", metavar="IMAGE=COL,…", help="Columns that feed the model, e.g. image=photo.")
    names = click.option("--columns", metavar="A,B,…", help="Column names of a table that has no header.")
    return inputs(names(command))


def parse_mapping(text: str | None, option: str) -> dict[str, str]:
    """Parse 'image=col,audio=col2'."""
    mapping = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UsageError(
                f"{option} {part.strip()!r} is not of the form modality=column", f"e.g. {option} image=photo"
            )
        mapping[key.strip()] = value.strip()
    return mapping


def parse_names(text: str | None) -> list[str]:
    """Parse 'a,b,c'."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]
