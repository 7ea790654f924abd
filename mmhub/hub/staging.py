"""Decide what of a checkpoint folder may be published: the files of the layout, sound and without what is private."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mmhub.checkpoint import ALLOWED
from mmhub.errors import MmhubError, TrustError
from mmhub.hub.findings import Finding, listed, refusal
from mmhub.hub.leaks import Leak, find_leaks
from mmhub.weights import check_header

__all__ = ["Staged", "finding_of", "listed", "look", "stage"]
_JUNK = ("__pycache__", ".cache", ".git", ".ipynb_checkpoints")  # folders named as a whole


@dataclass(frozen=True)
class Staged:
    """Files by their names in the folder: those to be sent, and those that belong to no checkpoint; what was found."""

    files: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def forbidden(self) -> bool:
        """May it not be sent, whoever insists? A file is damaged, not of this folder, or holds a secret."""
        return not all(one.forceable for one in self.findings)


def stage(folder: Path, *, every: bool = False) -> Staged:
    """List the files of a checkpoint folder that may be sent, as `look` does.

    Raises:
        TrustError: a symbolic link leads out, a file holds a secret, or weights are damaged; every such file is named.
        What may be forced, personal paths, is left to whoever asked.
    """
    staged = look(folder, every=every)
    if staged.forbidden:
        raise refusal(str(folder), staged.findings, staged.left_out)
    return staged


def look(folder: Path, *, every: bool = False) -> Staged:
    """List the files of a checkpoint folder and what forbids sending them.

    `every` takes all names, of a folder that we just wrote.
    """
    files, left_out, findings = [], [], list[Finding]()
    for name in _names(folder):
        path = folder / name
        if path.is_dir() or not (every or ALLOWED.fullmatch(name)):
            left_out.append(name)
            continue
        findings += _findings(path, folder, name)
        files.append(name)
    return Staged(tuple(files), tuple(left_out), tuple(findings))


def _names(folder: Path) -> list[str]:
    """Every file below `folder`, and every link, none followed; folders of leftovers by their own name alone."""
    found = []
    for place, folders, files in os.walk(folder):
        at = Path(place).relative_to(folder)
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        junk = [name for name in folders if name in _JUNK]
        folders[:] = sorted(name for name in folders if name not in (*links, *junk))
        found += [(at / name).as_posix() for name in (*files, *links)]
        found += [f"{(at / name).as_posix()}/" for name in junk if name not in links]
    return sorted(found)


def _findings(path: Path, folder: Path, name: str) -> list[Finding]:
    if path.is_symlink() and not _inside_cache(path, folder):
        message = f"'{name}' is a symbolic link: replace it by the file itself"
        return [Finding(kind="link", message=message, hint="replace it by the file itself")]
    if path.exists() and not path.is_file():  # a pipe would be waited for
        return [Finding(kind="damage", message=f"'{name}' is no file, but a pipe or a device", hint="write it again")]
    try:
        leaks = _leaks(path)
    except TrustError as error:
        return [Finding(kind="damage", message=f"'{name}' is damaged: {error.message}", hint="write it again")]
    except OSError as error:
        raise MmhubError(f"cannot read '{path}': {error.strerror}", "check its permissions") from None
    return [finding_of(f"'{name}'", leak) for leak in leaks]


def _leaks(path: Path) -> list[Leak]:
    if path.suffix == ".safetensors":
        check_header(path)
        return find_leaks(_header(path), form="json")
    text = path.read_text(encoding="utf-8", errors="replace")
    return find_leaks(text, form="json" if path.suffix == ".json" else "card" if path.name == "README.md" else "text")


def finding_of(where: str, leak: Leak) -> Finding:
    """Say that a text called `where` holds something private; a path may be published if its owner insists."""
    forceable = leak.kind == "path"
    message, public = f"{where} {leak.what}", f"{where} {leak.public}"
    return Finding(kind=leak.kind, message=message, hint="remove it", forceable=forceable, public=public)


def _inside_cache(path: Path, folder: Path) -> bool:
    """Snapshots of the Hugging Face cache consist of links to their own repository's blobs."""
    return path.resolve().parent == (folder.resolve().parent.parent / "blobs")


def _header(path: Path) -> str:
    """The names and metadata in a safetensors file whose header was checked."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little")).decode("utf-8", errors="replace")
