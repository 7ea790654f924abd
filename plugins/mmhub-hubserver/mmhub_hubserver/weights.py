"""Numbers of parameters, read from the headers of safetensors files and never from the tensors."""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmhub_hubserver.errors import HubError
from mmhub_hubserver.store import Commit, Repo

_MAX_HEADER = 8 << 20  # bytes; larger models than this describes do not fit on one machine
_MAX_FILES = 256
_MAX_DIMENSIONS, _MAX_DTYPES, _MAX_DTYPE = 16, 32, 32  # of a tensor; kinds of them in a file; letters of a kind
_SUFFIX = ".safetensors"


def parameters(repo: Repo, commit: Commit) -> dict[str, Any] | None:
    """Return {"parameters": {dtype: number}, "total": number} of the weights at the top of a repository."""
    found: dict[str, int] = {}
    names = [path for path in commit.files if path.endswith(_SUFFIX) and "/" not in path]
    if not names or len(names) > _MAX_FILES:
        return None
    for name in names:
        entry = commit.files[name]
        if not entry.lfs:
            continue
        try:
            counts = _counted(repo.large(entry))
        except (OSError, HubError):
            continue  # lost or damaged on the disk: the rest is still worth telling
        for dtype, number in counts.items():
            found[dtype] = found.get(dtype, 0) + number
    return {"parameters": found, "total": sum(found.values())} if found else None


@lru_cache(maxsize=4096)
def _counted(path: Path) -> dict[str, int]:
    """Count by dtype; empty if the file is not safetensors. Its path is its hash, so the answer stays true."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= _MAX_HEADER:
            return {}
        header = file.read(size)
    try:
        tensors = json.loads(header)
        found: dict[str, int] = {}
        for name, tensor in tensors.items():
            if name != "__metadata__":
                dtype = _dtype(tensor["dtype"])
                found[dtype] = found.get(dtype, 0) + _size(tensor["shape"])
                if len(found) > _MAX_DTYPES:
                    return {}
        return found
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _size(shape: Any) -> int:
    """Return the number of elements; a shape that no tensor has is refused before its number gets out of hand."""
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError("not a shape")
    if not all(isinstance(size, int) and 0 <= size < 1 << 48 for size in shape):
        raise ValueError("not a shape")
    size = math.prod(shape)
    if size >= 1 << 63:
        raise ValueError("not a shape")
    return size


def _dtype(name: Any) -> str:
    if not isinstance(name, str) or len(name) > _MAX_DTYPE:
        raise ValueError("not a type")
    return name
