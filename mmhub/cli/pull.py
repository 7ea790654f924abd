"""`mmhub pull`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mmhub.cli.output import emit, json_option, note, quiet_option
from mmhub.cli.text import printable


@click.command()
@click.argument("name")
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--out", type=click.Path(path_type=Path), help="Put the files here instead of into the cache.")
@click.option("--verify", metavar="KEY.pub", help="Whose signature it must have; 'sigstore:IDENTITY,ISSUER' for one.")
@quiet_option
@json_option
def pull(name: str, revision: str | None, out: Path | None, verify: str | None, quiet: bool, as_json: bool) -> None:
    """Fetch the model NAME and check every file against its hash, and with --verify against what was signed.

    NAME#image fetches only what the image encoder needs. An interrupted pull goes on from where it ended.
    A model that needs a plugin which is not installed fails before its weights are fetched, and says what to install.
    """
    if quiet or as_json or not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    from mmhub.checkpoint import is_checkpoint, read_config, verify_files
    from mmhub.hub.pull import locate, resolve_name
    from mmhub.hub.signing import NAME, read_signer, signed_name

    signer = read_signer(verify) if verify else None
    folder, verified = locate(name, resolve_name(name, revision), out, signer)
    task = ""  # of another library's model
    if not verified or is_checkpoint(folder):
        config = read_config(folder)
        task = config.task
        if not verified:
            verify_files(folder, config)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    signed_as = signed_name(folder / NAME, name) if signer and (folder / NAME).is_file() else None
    if signer:
        under = f" as {printable(signed_as)}" if signed_as else ""
        note(f"signed by {signer}{under}, and every file is what was signed", quiet)
    data = {
        "name": name,
        "path": str(folder),
        "task": task,
        "files": files,
        "signed_by": str(signer) if signer else None,
        "signed_as": signed_as,
    }
    emit(data, as_json, str(folder))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
