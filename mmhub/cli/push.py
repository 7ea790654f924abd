"""`mmhub push`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from mmhub.cli.keys import ask_passphrase
from mmhub.cli.output import emit, json_option, note, quiet_option, table

if TYPE_CHECKING:
    from mmhub.hub.findings import Finding


@click.command()
@click.argument("model")
@click.argument("repo")
@click.option("--license", "license_", default="", metavar="ID", help="Licence of the model, e.g. apache-2.0.")
@click.option("-m", "--message", default="", help="Commit message.")
@click.option("--private/--public", default=None, help="For a new repository.")
@click.option("--gated", type=click.Choice(["auto", "manual"]), help="Let people ask for access first.")
@click.option("--revision", help="Branch to push to, made if needed; 'pr' proposes the change as a pull request.")
@click.option("--tag", default="", help="Tag the commit.")
@click.option("--layout", default="", help="Write it as transformers, sentence-transformers or timm users load it.")
@click.option("--sign", default="", metavar="KEY", help="Sign all of it with this private key, or as 'sigstore'.")
@click.option(
    "--force",
    is_flag=False,
    flag_value="",
    metavar="[WHY]",
    help="Publish in spite of what may be forced; is recorded.",
)
@click.option("--dry-run", is_flag=True, help="List what would be sent, and send nothing.")
@quiet_option
@json_option
def push(
    model: str,
    repo: str,
    license_: str,
    message: str,
    private: bool | None,
    gated: Literal["auto", "manual"] | None,
    revision: str | None,
    tag: str,
    layout: str,
    sign: str,
    force: str | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Publish MODEL (a checkpoint folder or name) to REPO (org/name) as one commit.

    The Hub is the one HF_ENDPOINT names, else the public one; log in with `hf auth login`. Interrupted, it leaves the
    repository as it was; push again to go on: files that arrived whole are not sent a second time.

    Refused is what has no licence or holds a secret; and, unless forced, what holds a path of this machine, has an
    empty heading for its use, limits or training data, or was measured on rows that it was trained on. The WHY of
    --force stands in the published provenance.json.
    """
    from mmhub.checkpoint import is_checkpoint
    from mmhub.hub import load, pull
    from mmhub.hub import push as run
    from mmhub.hub.findings import Unstated, Untrusted, listed

    folder = pull(model)
    try:
        pushed = run(
            folder if is_checkpoint(folder) or not (folder / "config.json").is_file() else load(model),
            repo,
            license=license_,
            message=message,
            private=private,
            gated=gated,
            revision=revision,
            tag=tag,
            layout=layout,
            dry_run=dry_run,
            force=force,
            sign=sign,
            passphrase=ask_passphrase(sign),
        )
    except (Unstated, Untrusted) as refused:
        if dry_run:
            _tell(refused.findings, quiet)
            if as_json:
                emit({"repo": repo, "dry_run": True, "findings": [one.table() for one in refused.findings]}, True, "")
        raise
    data: dict[str, Any] = {
        "repo": pushed.repo,
        "url": pushed.url,
        "commit": pushed.commit,
        "files": pushed.files,
        "deleted": list(pushed.deleted),
        "left_out": list(pushed.left_out),
        "pull_request": pushed.pull_request or None,
        "dry_run": pushed.dry_run,
        "changed": pushed.changed,
        "signed": bool(sign),
        "findings": [one.table() for one in pushed.findings],
    }
    total = sum(pushed.files.values())
    if pushed.changed:
        _tell(pushed.findings, quiet)
        note(f"{len(pushed.files)} files, {total:,} bytes" + (" would be sent" if dry_run else " sent"), quiet)
    else:
        note(f"nothing differs from what '{repo}' holds; no commit was made", quiet)
    if "model.sig" in pushed.deleted:
        note("it is no longer signed: the signature was of the older version (--sign KEY signs)", quiet)
    if pushed.left_out:
        note(f"never sent, for they belong to no checkpoint: {listed(pushed.left_out)}", quiet)
    done = pushed.pull_request or f"{pushed.url} @ {pushed.commit}"
    text = table(["file", "bytes"], sorted(pushed.files.items())) if dry_run else done
    emit(data, as_json, text)


def _tell(findings: Sequence[Finding], quiet: bool) -> None:
    """Say what the gate let pass; what it refused is told by the error."""
    for one in findings:
        if one.severity == "note":
            note(f"forced: {one.message}" if one.forced else f"{one.message}; {one.hint}", quiet)
