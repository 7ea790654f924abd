"""`mmhub keys`: make the keys that models are signed with."""

from __future__ import annotations

import os
from pathlib import Path

import click

from mmhub.cli.output import emit, json_option, note, quiet_option


@click.group()
def keys() -> None:
    """Make the keys that models are signed with."""


@keys.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--passphrase", is_flag=True, help="Lock it with a passphrase, which is asked for.")
@quiet_option
@json_option
def new(file: Path, passphrase: bool, quiet: bool, as_json: bool) -> None:
    """Write a private key to FILE, which is yours alone, and its public key to FILE.pub, which everybody may have.

    The passphrase may also stand in MMHUB_KEY_PASSPHRASE.
    """
    from mmhub.hub.signing import PASSPHRASE, Signer, new_key

    secret = os.environ.get(PASSPHRASE, "")
    if passphrase and not secret:
        secret = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
    public = new_key(file, secret)
    found = Signer(public).fingerprint
    emit({"private": file, "public": public, "fingerprint": found, "locked": bool(secret)}, as_json, str(public))
    note(f"sign with: mmhub push MODEL REPO --sign {file}; others check with: --verify {public.name}", quiet)


def ask_passphrase(key: str) -> str:
    """Return the passphrase of a private key, asked for on a terminal if it needs one; '' if it needs none."""
    from mmhub.hub.signing import PASSPHRASE, SIGSTORE, is_locked

    if not key or key == SIGSTORE or not is_locked(Path(key).expanduser()):
        return ""
    known = os.environ.get(PASSPHRASE, "")
    return known or str(click.prompt(f"Passphrase of {key}", hide_input=True, err=True))
