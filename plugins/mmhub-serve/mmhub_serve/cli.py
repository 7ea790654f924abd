"""`mmhub serve`."""

from __future__ import annotations

import click

from mmhub.cli.options import device_option, quantize_option
from mmhub.cli.output import note, quiet_option


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free port.")
@device_option
@quantize_option
@quiet_option
def serve(names: tuple[str, ...], host: str, port: int, device: str, quantize: str | None, quiet: bool) -> None:
    """Answer requests to the models NAME over HTTP until Ctrl-C or SIGTERM."""
    import uvicorn

    from mmhub_serve.app import build_app
    from mmhub_serve.settings import Settings

    settings = Settings(models=names, host=host, port=port, device=device, quantize=quantize)
    note(f"mmhub serves {', '.join(names)} at http://{host}:{port}", quiet)
    uvicorn.run(build_app(settings), host=host, port=port, log_level="warning")
