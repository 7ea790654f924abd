"""Where a checkpoint comes from: data ids and hashes, code, parents, seed, steps, hardware and versions."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import torch

from mmhub.config import Recipe
from mmhub.data.sources import Rows
from mmhub.data.stream import Stream
from mmhub.model import Model


def provenance(
    recipe: Recipe,
    model: Model,
    train: Rows | Stream,
    valid: Rows | None,
    *,
    steps: int,
    seconds: float,
    parents: Sequence[Mapping[str, str]] = (),
    code: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the facts that go into provenance.json; no path of this machine is among them.

    `parents` and `code` are what `mmhub.lineage` says; `code` is None outside a git repository.
    """
    data = {"train": _data(train)}
    if valid is not None:
        data["valid"] = _data(valid)
    settings = msgspec.to_builtins(recipe)
    return {
        "task": recipe.task,
        "seed": recipe.seed,
        "steps": steps,
        "seconds": round(seconds, 1),
        "hardware": hardware(),
        "versions": versions(model),
        "code": None if code is None else dict(code),
        "parents": [dict(parent) for parent in parents],
        "data": data,
        "train": settings["train"],
        "model": _without_folders(settings["model"]),
    }


def _data(rows: Rows | Stream) -> dict[str, Any]:
    facts = dict(rows.fingerprint())
    for file in facts.get("files", []):
        file["name"] = Path(str(file["name"])).name
    source = facts.pop("source", None)
    named = facts.get("revision") or facts.get("readers")
    return {"id": source} | facts if named else facts  # else it names files, which stand there anyway


def _without_folders(value: Any) -> Any:
    """Keep the last part of anything that looks like a path to a file."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "./", "../", "~")):
        return Path(value).name
    return value


def hardware() -> str:
    """Name the processor and, if there is one, the GPU."""
    cpu = f"{os.cpu_count()} x {_cpu_name()}"
    return f"{torch.cuda.get_device_name()}, {cpu}" if torch.cuda.is_available() else cpu


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def versions(model: Model) -> dict[str, str]:
    """Versions of Python, torch, mmhub and every plugin the model was built from."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__}
    for name in ("transformers", "timm", "torchaudio"):
        if name in sys.modules:
            found[name] = metadata.version(name)
    return found | {part.distribution: part.version for part in model.sources.values()}
