"""`mmhub ui`."""

from __future__ import annotations

from pathlib import Path

import click

from mmhub.cli.options import device_option
from mmhub.cli.output import note, quiet_option


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 takes a free port.")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Training runs.")
@click.option("--export-space", "space", type=click.Path(path_type=Path), help="Write a Space for NAME to this folder.")
@device_option
@quiet_option
def ui(names: tuple[str, ...], host: str, port: int, runs: Path, space: Path | None, device: str, quiet: bool) -> None:
    """Try models, compare them and watch training in a browser, until Ctrl-C."""
    if space is not None:
        from mmhub_ui.space import export_space

        export_space(names, space)
        note(f"a Space for {', '.join(names)} in {space}", quiet)
        return
    from mmhub_ui.app import build_app
    from mmhub_ui.context import Context

    app = build_app(Context(names=names, runs=runs, device=device))
    note(f"mmhub ui at http://{host}:{port}", quiet)
    app.launch(server_name=host, server_port=port, share=False, inbrowser=False, quiet=True)
