"""What a model is made of, so that a job that is gone on with is known to be of the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmhub.errors import MmhubError
from mmhub.hashes import sha256_of
from mmhub.names import Resolved, resolve

_CONTENT = (".safetensors", ".json", ".txt", ".model")


def model_identity(name: str) -> dict[str, Any]:
    """Return the commit of a model on a Hub, or hashes of the files of one in a folder; {} of what is neither."""
    try:
        found = resolve(name)
        return _of(found)
    except (MmhubError, OSError):
        return {}  # it was loaded, and may be composed of parts or be no file at all


def _of(found: Resolved) -> dict[str, Any]:
    part = {"component": found.component} if found.component else {}
    if found.kind == "hub":
        from mmhub.hub.pull import at_commit

        return part | {"repository": found.repo_id, "commit": at_commit(found)[0].commit}
    if found.path is None:
        return part | {"name": found.name}
    folder: Path = found.path
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _CONTENT)
    return part | {"files": {path.name: sha256_of(path) for path in files}}
