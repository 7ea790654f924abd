"""`mmhub pull`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mmhub.cli.output import emit, json_option, quiet_option


@click.command()
@click.argument("name")
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--out", type=click.Path(path_type=Path), help="Put the files here instead of into the cache.")
@quiet_option
@json_option
def pull(name: str, revision: str | None, out: Path | None, quiet: bool, as_json: bool) -> None:
    """Fetch the model NAME and check every file against its hash.

    NAME#image fetches only what the image encoder needs. An interrupted pull goes on from where it ended.
    A model that needs a plugin which is not installed fails before its weights are fetched, and says what to install.
    """
    if quiet or as_json or not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    from mmhub.checkpoint import is_checkpoint, read_config, verify_files
    from mmhub.hub.pull import locate, resolve_name

    folder, verified = locate(name, resolve_name(name, revision), out)
    task = ""  # of another library's model
    if not verified or is_checkpoint(folder):
        config = read_config(folder)
        task = config.task
        if not verified:
            verify_files(folder, config)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    emit({"name": name, "path": str(folder), "task": task, "files": files}, as_json, str(folder))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
