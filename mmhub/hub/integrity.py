"""Is a file of the Hugging Face cache what the Hub said it is? Its blob's name is its hash. Where may weights be?

The cache names each blob by the ETag the server gave: the SHA-256 of a large file, git's SHA-1 of a small one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mmhub.errors import TrustError
from mmhub.hashes import git_sha1_of, sha256_of
from mmhub.reading import INDEX_BYTES, parse_json, read_plain

_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def is_blob(path: Path) -> bool:
    """Is this a file of the cache, or a link to one, whose name is its hash?

    Where the system knows no symbolic links (Windows), snapshots hold plain files, which are not.
    """
    return blob_name(path) is not None


def blob_name(path: Path) -> str | None:
    """Return the hash that names the blob of `path`, or None."""
    hop = Path(os.path.abspath(path.parent / os.readlink(path))) if path.is_symlink() else path
    blob = hop if hop.parent.name == "blobs" else path  # a blob may itself be a link into a store several caches share
    return blob.name if blob.parent.name == "blobs" and _NAME.fullmatch(blob.name) else None


def check_blob(path: Path, *, fresh: bool = False) -> bool:
    """Does a file of the cache have the hash it is named by? `fresh` reads it even if its hash is remembered.

    Raises:
        ValueError: it is none that is named by its hash; see `is_blob`.
    """
    name = blob_name(path)
    if name is None:
        raise ValueError(f"'{path}' is not named by its hash")
    try:
        return (git_sha1_of if len(name) == 40 else sha256_of)(path, fresh=fresh) == name
    except OSError:
        return False


def read_index(folder: Path) -> dict[str, str]:
    """Return which file beside it holds each tensor by `model.safetensors.index.json`, {} if there is no such file.

    Raises:
        TrustError: it is damaged, or names anything but a safetensors file in the folder.
    """
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return {}
    try:
        shards = parse_json(read_plain(path, INDEX_BYTES))["weight_map"]
        files = {str(tensor): file for tensor, file in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise TrustError(f"'{path}' is no index of safetensors files") from None
    for file in files.values():
        plain = isinstance(file, str) and not re.search(r"[/\\:]", file)
        if not plain or not file.endswith(".safetensors"):
            raise TrustError(f"'{path}' names {str(file)[:80]!r}, which is not a safetensors file beside it")
    return files


__all__ = ["blob_name", "check_blob", "is_blob", "read_index", "sha256_of"]
