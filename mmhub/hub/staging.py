"""Decide what of a checkpoint folder may be published: the files of the layout, sound and without secrets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mmhub.checkpoint import ALLOWED
from mmhub.errors import MmhubError, TrustError
from mmhub.hub.secrets import find_secret
from mmhub.weights import check_header

_SHOWN = 20  # names in one message
_JUNK = ("__pycache__", ".cache", ".git", ".ipynb_checkpoints")  # folders named as a whole


@dataclass(frozen=True)
class Staged:
    """Files by their names in the folder: those to be sent, and those that belong to no checkpoint."""

    files: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def stage(folder: Path, *, every: bool = False) -> Staged:
    """List the files of a checkpoint folder that may be sent; `every` takes all names, of a folder that we just wrote.

    Raises:
        TrustError: a symbolic link leads out, a secret is in a file, or weights are damaged; every such file is named.
    """
    files, left_out, problems = [], [], []
    for name in _names(folder):
        path = folder / name
        if path.is_dir() or not (every or ALLOWED.fullmatch(name)):
            left_out.append(name)
            continue
        problem = _problem(path, folder)
        if problem:
            problems.append(f"'{name}' {problem}")
        files.append(name)
    if problems:
        also = f"; never sent are {listed(left_out)}" if left_out else ""
        what = "correct it" if len(problems) == 1 else "correct them"
        raise TrustError(f"nothing of '{folder}' was sent: {'; '.join(problems)}{also}", f"{what}, then push again")
    return Staged(tuple(files), tuple(left_out))


def listed(names: list[str] | tuple[str, ...]) -> str:
    """Name files in a message, not more than a screen takes."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


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


def _problem(path: Path, folder: Path) -> str | None:
    if path.is_symlink() and not _inside_cache(path, folder):
        return "is a symbolic link: replace it by the file itself"
    try:
        if path.suffix == ".safetensors":
            check_header(path)
            secret = find_secret(_header(path))
        else:
            secret = find_secret(path.read_text(encoding="utf-8", errors="replace"))
    except TrustError as error:
        return f"is damaged: {error.message}"
    except OSError as error:
        raise MmhubError(f"cannot read '{path}': {error.strerror}", "check its permissions") from None
    return f"holds what looks like a secret, {secret}" if secret else None


def _inside_cache(path: Path, folder: Path) -> bool:
    """Snapshots of the Hugging Face cache consist of links to their own repository's blobs."""
    return path.resolve().parent == (folder.resolve().parent.parent / "blobs")


def _header(path: Path) -> str:
    """The names and metadata in a safetensors file whose header was checked."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little")).decode("utf-8", errors="replace")
