"""What features depend on: the encoder, what it reads, and how it is run. Another key, another set of features."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from array import array
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

import mmhub
from mmhub.data.loader import usable
from mmhub.data.sources import Rows
from mmhub.interfaces import Policy, Processor
from mmhub.model import Model

_LIBRARIES = ("numpy", "transformers", "tokenizers", "timm", "torchvision", "torchaudio", "soundfile", "pillow")


class Unknowable(Exception):
    """A raw input is of a kind whose content cannot be told from another's."""


@dataclasses.dataclass(frozen=True)
class Cells:
    """One column of a data set: a hash of all its raw inputs, and how long each is, in whatever unit; -1 = missing.

    `several` says whether a row holds more than one.
    """

    digest: str
    lengths: array[int]
    several: bool


def read_cells(rows: Rows, modality: str, column: str, processor: Processor, *, alone: bool) -> Cells:
    """Go over a column once; files it names count with their size and times, and are not read.

    Raises:
        Unknowable: a raw input is an object that has no bytes.
    """
    hasher, lengths, several = hashlib.sha256(), array("q"), False
    for i, cell in enumerate(rows.column(column)):
        value = usable(modality, cell, rows.folder(i), alone)
        length = _feed(hasher, value, files=modality != "text")
        lengths.append(-1 if value is None else length)
        several = several or len(processor.items_of(value)) > 1
    return Cells(hasher.hexdigest(), lengths, several)


def feature_key(model: Model, name: str, cells: Cells, **how: Any) -> str:
    """Return the name of the set of features of a modality; `how` is all that is no part of the model or the data."""
    encoder: Any = model.encoders[name]
    source = model.sources[f"{name}_encoder"]
    device = model.device
    facts = {
        "cells": cells.digest,
        "component": [source.id, source.spec.schema, source.version],
        "config": msgspec.to_builtins(encoder.config),
        "weights": _weights(encoder),
        "processor": encoder.processor.state(),
        "files": {file: hashlib.sha256(content).hexdigest() for file, content in encoder.processor.files().items()},
        "code": sorted({_code(type(encoder)), _code(type(encoder.processor))}),
        "versions": _versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "matmul": torch.get_float32_matmul_precision(),
    } | {key: dataclasses.asdict(value) if isinstance(value, Policy) else str(value) for key, value in how.items()}
    return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()[:32]


def _weights(encoder: torch.nn.Module) -> str:
    hasher = hashlib.sha256()
    for name, value in (*encoder.state_dict().items(), *encoder.named_buffers()):
        _feed(hasher, name, files=False)
        _feed(hasher, value if isinstance(value, Tensor) else repr(value), files=False)
    return hasher.hexdigest()


def _code(part: type) -> str:
    """A hash of the Python files of a part's package, for whoever is writing an encoder does not raise its version."""
    hasher = hashlib.sha256()
    package = part.__module__.partition(".")[0]
    origin = getattr(sys.modules.get(package), "__file__", None) or ""
    files = [Path(origin)] if origin else []
    if origin.endswith("__init__.py"):
        files = sorted(Path(origin).parent.rglob("*.py"))
    for file in files:
        _feed(hasher, str(file.relative_to(Path(origin).parent)), files=False)
        hasher.update(file.read_bytes())
    return f"{package} {hasher.hexdigest()}"


def _versions() -> dict[str, str]:
    found = {"mmhub": mmhub.__version__, "torch": str(torch.__version__)}
    for name in _LIBRARIES:  # whether imported or not: that may differ between a run and its resumption
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _feed(hasher: Any, value: Any, *, files: bool) -> int:
    """Add a raw input to a hash, unambiguously; return its length."""
    if isinstance(value, os.PathLike) or (files and isinstance(value, str)):
        return _feed_place(hasher, os.fspath(value))
    if isinstance(value, Mapping):
        pairs = sorted(value.items(), key=lambda pair: str(pair[0]))
        if value.get("bytes") is not None:  # the path beside it is a name alone
            pairs = [("bytes", value["bytes"])]
        return _feed_all(hasher, "map", (part for pair in pairs for part in pair), len(pairs), files)
    if isinstance(value, (list, tuple)):
        return _feed_all(hasher, "list", value, len(value), files)
    kind, content = _content(value)
    hasher.update(f"{kind} {len(content)} ".encode())
    hasher.update(content)
    return len(content)


def _feed_all(hasher: Any, kind: str, values: Iterable[Any], count: int, files: bool) -> int:
    hasher.update(f"{kind} {count} ".encode())
    return sum(_feed(hasher, value, files=files) for value in values)


def _feed_place(hasher: Any, text: Any) -> int:
    """Add a path or an address; a file that is there is known by its size and times."""
    try:
        stat = os.stat(text)
        facts, length = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino], stat.st_size
    except (OSError, ValueError):
        facts, length = [], len(text)
    hasher.update(f"place {len(text)} {text!r} {facts} ".encode(errors="surrogatepass"))
    return length


def _content(value: Any) -> tuple[str, Any]:
    """The kind and bytes of a raw input."""
    if isinstance(value, str):
        return "text", value.encode(errors="surrogatepass")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "bytes", bytes(value)
    if value is None or isinstance(value, (bool, int, float)):
        return "number", repr(value).encode()
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        return f"tensor {plain.dtype} {tuple(plain.shape)}", plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    if hasattr(value, "dtype") and hasattr(value, "tobytes") and not value.dtype.hasobject:  # an array of NumPy's
        return f"array {value.dtype} {value.shape}", value.tobytes()
    if hasattr(value, "mode") and hasattr(value, "size") and hasattr(value, "tobytes"):  # a picture of Pillow's
        return f"picture {value.mode} {value.size}", value.tobytes()
    raise Unknowable(f"a {type(value).__name__} has no content that could be compared")
