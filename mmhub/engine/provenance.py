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
from mmhub.data.parts import without_secrets
from mmhub.data.sources import Rows
from mmhub.data.stream import Stream
from mmhub.model import Model

_PATH = re.compile(r"(\w+:)?(/|\.{1,2}/|~)(?!/)")
_QUICK = 2**31  # bytes of data that are hashed at the start of a run


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
    stages: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the facts that go into provenance.json; no path of this machine is among them.

    `parents` and `code` are what `mmhub.lineage` says; `code` is None outside a git repository. `stages` are those of
    the run, if it had some; `steps` and `seconds` are of all of them then, and data the last one's.
    """
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
        "data": data_facts(train, valid),
        **({"stages": [dict(stage) for stage in stages]} if stages else {}),
        "train": public(settings["train"]),
        "model": public(settings["model"]),
    }


def data_facts(train: Rows | Stream, valid: Rows | None) -> dict[str, Any]:
    """Return what identifies the data, with hashes."""
    return {"train": _data(train)} | ({} if valid is None else {"valid": _data(valid)})


def known_data(train: Rows | Stream, valid: Rows | None) -> dict[str, Any]:
    """Return what can soon be said of the data: for what would take long to hash, its name, rows and bytes."""
    found = {}
    for split, rows in (("train", train), ("valid", valid)):
        if isinstance(rows, Rows) and rows.bytes > _QUICK:
            found[split] = {"id": public(rows.source), "rows": len(rows), "bytes": rows.bytes}
        elif rows is not None:
            found[split] = _data(rows)
    return found


def _data(rows: Rows | Stream) -> dict[str, Any]:
    facts = dict(rows.fingerprint())
    for file in facts.get("files", []):
        file["name"] = Path(str(file["name"])).name
    source = facts.pop("source", None)
    named = facts.get("revision") or facts.get("readers")
    return {"id": source} | facts if named else facts  # else it names files, which stand there anyway


def public(value: Any, folder: Path | None = None) -> Any:
    """Return plain data as it may leave this machine: without logins and signatures in addresses, or folders of paths.

    A path inside of `folder` is shown from there, any other by its last part.

    >>> public(["s3://ada:pw@host/x?X-Amz-Signature=1", "/home/ada/train.csv", "sql:/home/ada/sales.db", "org/model"])
    ['s3://host/x', 'train.csv', 'sql:sales.db', 'org/model']
    """
    if isinstance(value, Mapping):
        return {key: public(item, folder) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item, folder) for item in value]
    if not isinstance(value, str):
        return value
    match, path = _PATH.match(value), Path(os.path.expanduser(value))
    if folder is not None and path.is_absolute() and path.is_relative_to(folder):
        return path.relative_to(folder).as_posix()
    if match or path.is_absolute():
        return (match[1] or "" if match else "") + Path(value).name
    return public_text(value)


def public_text(text: str) -> str:
    """Return a text without logins and signatures in its addresses, the home folder written as ~."""
    shown = without_secrets(text)
    home = os.path.expanduser("~").rstrip("/")  # ~ itself where nobody knows this user
    return re.sub(rf"{re.escape(home)}(?=[/\\'\"\s:;,]|$)", "~", shown) if home else shown


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
