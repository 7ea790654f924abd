"""`mmhub hub`: run the hub in a terminal."""

import os
from pathlib import Path

import click

from mmhub_hubserver.errors import StoreUnusable
from mmhub_hubserver.server import HubServer, is_loopback


@click.group()
def hub() -> None:
    """Run a team hub that speaks the Hugging Face Hub protocol."""


@hub.command()
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Where repositories are stored.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Loopback address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8377, show_default=True, help="0 takes a free port.")
def serve(data: Path | None, host: str, port: int) -> None:
    """Serve models and datasets to this machine until Ctrl-C."""
    if not is_loopback(host):
        raise click.UsageError(f"--host {host}: only loopback (127.0.0.1) is served; access control comes later.")
    folder = (data or _default_folder()).expanduser().absolute()
    try:
        server = HubServer(folder, host, port)
    except StoreUnusable as error:
        raise click.ClickException(error.message) from None
    except OSError as error:
        raise click.ClickException(f"Cannot serve {folder} on {host}:{port}: {error.strerror}.") from None
    click.echo(_greeting(server.url, folder), err=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo("\nStopped.", err=True)
        raise SystemExit(130) from None
    finally:
        server.close()


def _default_folder() -> Path:
    data_home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data_home) / "mmhub" / "hub"


def _greeting(url: str, folder: Path) -> str:
    return (
        f"mmhub hub at {url}\n"
        f"Data in      {folder}\n"
        f"Use it:      export HF_ENDPOINT={url}\n"
        "Large uploads from transformers, timm or huggingface_hub also need: export HF_HUB_DISABLE_XET=1\n"
        "Ctrl-C stops it."
    )
