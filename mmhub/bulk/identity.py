"""What a model is made of, so that a job that is gone on with is known to be of the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmhub.errors import MmhubError
from mmhub.hashes import sha256_of
from mmhub.names import Resolved, resolve

_CARD = ("README.md", "eval")  # what is said of a model, which may change


def model_identity(name: str) -> dict[str, Any]:
    """Return the commit of a model on a Hub, or hashes of the files of one in a folder; {} of what is neither."""
    try:
        return _of(resolve(name))
    except (MmhubError, OSError):
        return {}  # it was loaded, and may be composed of parts or be no file at all


def file_identity(name: str) -> str:
    """Return the hash of a file, its name where it cannot be read: whoever needs it will say so."""
    try:
        return sha256_of(Path(name))
    except OSError:
        return name


def _of(found: Resolved) -> dict[str, Any]:
    part = {"component": found.component} if found.component else {}
    if found.kind == "hub":
        from mmhub.hub.pull import at_commit

        return part | {"repository": found.repo_id, "commit": at_commit(found)[0].commit}
    if found.path is None:
        return part | {"name": found.name}
    return part | {"files": {name: sha256_of(path) for name, path in _files(found.path)}}


def _files(path: Path) -> list[tuple[str, Path]]:
    """The files of a model's folder with their names, of hidden ones none."""
    below = ((file.relative_to(path).parts, file) for file in sorted(path.rglob("*")) if file.is_file())
    return [
        ("/".join(parts), file)
        for parts, file in below
        if parts[0] not in _CARD and not any(part.startswith(".") for part in parts)
    ]
