"""`mmhub export`."""

from __future__ import annotations

import re
from pathlib import Path

import click

from mmhub.cli.output import emit, json_option, note, quiet_option
from mmhub.errors import UsageError
from mmhub_export.formats import FORMATS


@click.command()
@click.argument("name")
@click.option("--format", "format", type=click.Choice(list(FORMATS)), required=True, help="What to write.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write [default: NAME-FORMAT].")
@quiet_option
@json_option
def export(name: str, format: str, out: Path | None, quiet: bool, as_json: bool) -> None:
    """Write the model NAME for other programs, and check that what was written answers as the model does."""
    out = out or Path(f"{_plain(name)}-{format}")
    if out.exists():
        raise UsageError(f"'{out}' exists", "name another folder with --out")
    import mmhub
    from mmhub.files import disk_errors, new_folder
    from mmhub_export.formats import write_format

    model = mmhub.load(name)
    with disk_errors("the export", out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out) as folder:
            record = write_format(format, model, folder, []).write(folder)
    note(f"{name} as {format} in {out}", quiet)
    emit({"out": str(out), **record}, as_json, str(out))


def _plain(name: str) -> str:
    """The last word of a name, fit for a folder."""
    return re.sub(r"[^\w.-]+", "-", name.rstrip("/").rsplit("/", 1)[-1]).strip("-.") or "model"
