"""Checkpoints of a few hundred bytes, made without torch, and ways to put them on a Hub on loopback."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

SIZES = {"image_encoder": 400, "audio_encoder": 200, "text_encoder": 120, "fusion": 80, "decoder": 40}  # bytes


def weights(roles: Sequence[str]) -> bytes:
    """A safetensors file with one tensor for each part."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for role in roles:
        start, end = end, end + SIZES[role]
        header[f"{role}.weight"] = {"dtype": "F32", "shape": [SIZES[role] // 4], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(256)) * (end // 256) + bytes(end % 256)


def files(
    modalities: Sequence[str] = ("image",),
    *,
    task: str = "classification",
    license: str = "mit",
    requires: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
    card: Mapping[str, Any] | None = None,
    text: str = "Tells things apart.",
    dim: int = 8,
) -> dict[str, bytes]:
    """The files of a checkpoint, as a push would send them."""
    requires = {"mmhub-image": ">=0.1,<1"} if requires is None else requires
    roles = [*(f"{modality}_encoder" for modality in modalities), "fusion", "decoder"]
    content = weights(roles)
    config = {
        "mmhub_format": 1,
        "task": task,
        "components": {role: _part(role, dim) for role in roles},
        "requires": [{"distribution": name, "specifier": specifier} for name, specifier in requires.items()],
        "files": {"model.safetensors": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}},
    }
    metadata = {
        "library_name": "mmhub",
        "license": license,
        "tags": ["mmhub", task, *modalities, *requires, *tags],
    } | dict(card or {})
    result = {"data": "held-out", "rows": 9, "metrics": {"accuracy": 0.75}, "subsets": {"image": {"accuracy": 0.5}}}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": content,
        "README.md": f"---\n{json.dumps(metadata)}\n---\n# A model\n\n{text}\n".encode(),
        f"eval/{task}.json": json.dumps(result).encode(),
    }


def _part(role: str, dim: int) -> dict[str, Any]:
    use = {"fusion": "mmhub/streams", "decoder": "mmhub-heads/classification"}.get(role, f"mmhub-x/{role}")
    return {"use": use, "schema": 1, "config": {"dim": dim}, "weights": "model.safetensors"}


def upload(hub: str, repo: str, content: Mapping[str, bytes], *, tag: str = "") -> str:
    """Commit files to a repository, made if needed; return the commit."""
    api = HfApi(endpoint=hub, token=False)
    api.create_repo(repo, exist_ok=True)
    additions = [CommitOperationAdd(path, io.BytesIO(data)) for path, data in content.items()]
    commit = str(api.create_commit(repo, additions, commit_message="by hand").oid)
    if tag:
        api.create_tag(repo, tag=tag)
    return commit
