"""Resumable checkpoints: a model folder, optimizer state, random state and position, each in a fresh folder.

Weights and states are safetensors and JSON. A manifest with hashes is written last; a folder without a valid one is
not used. These folders are never published.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from mmhub.checkpoint import copy_parameters, load, read_tensors
from mmhub.errors import MmhubError, TrustError
from mmhub.files import disk_errors, new_folder, sha256, write_file
from mmhub.model import Model


class Position(msgspec.Struct):
    """How far a run has come. Steps are optimizer steps; `batches` counts those of the current epoch."""

    step: int = 0
    epoch: int = 0
    batches: int = 0
    best: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    skipped: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0  # since the last line in metrics.jsonl
    loss_steps: int = 0
    evaluated_step: int = -1


def save_state(folder: Path, model: Model, optimizer: torch.optim.Optimizer, position: Position, keep: int) -> Path:
    """Write the checkpoint of this step under `folder` and drop all but the newest `keep`."""
    from safetensors.torch import save_file

    target = folder / f"step-{position.step:08}"
    with disk_errors("a training checkpoint", folder), new_folder(target) as aside:
        model.save(aside / "model")
        save_file(_optimizer_tensors(optimizer) | _random_tensors(), aside / "state.safetensors")
        (aside / "state.safetensors").chmod(0o644)
        state = {"position": msgspec.to_builtins(position), "python_random": _python_random()}
        write_file(aside / "state.json", json.dumps(state))
        files = sorted(p for p in aside.rglob("*") if p.is_file())
        hashes = {path.relative_to(aside).as_posix(): sha256(path) for path in files}
        write_file(aside / "manifest.json", json.dumps(hashes, indent=1))
    for old in _steps(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def find_state(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest valid checkpoint under `folder`; damaged ones are reported and passed over, never deleted.

    Raises:
        TrustError: there are checkpoints and all are damaged.
    """
    steps = _steps(folder)
    for path in steps:
        problem = _damage(path)
        if problem is None:
            return path
        warn(f"checkpoint {path.name} is damaged ({problem}); trying the one before")
    if steps:
        raise TrustError(f"all checkpoints in '{folder}' are damaged", "start again with a new --out folder")
    return None


def load_model(path: Path) -> Model:
    """Load the model of a training checkpoint into private memory."""
    model = load(path / "model")
    copy_parameters(model)
    return model


def load_state(path: Path, optimizer: torch.optim.Optimizer) -> Position:
    """Restore optimizer and random states; return the position."""
    tensors = dict(read_tensors(path / "state.safetensors"))
    _restore_optimizer(optimizer, tensors)
    state = json.loads((path / "state.json").read_text())
    _restore_random(tensors, state["python_random"])
    return msgspec.convert(state["position"], Position)


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders, newest step first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def _damage(path: Path) -> str | None:
    try:
        hashes = json.loads((path / "manifest.json").read_text())
        for name, expected in hashes.items():
            if sha256(path / name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            tensors[f"optimizer.{number}.{key}"] = tensor.detach().cpu().contiguous()
    return tensors


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = tensor.clone()
    groups = optimizer.state_dict()["param_groups"]
    count = sum(len(group["params"]) for group in groups)
    if state and max(state) >= count:
        raise MmhubError(f"the checkpoint trains {max(state) + 1} tensors, the recipe {count}", "use the same recipe")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_tensors() -> dict[str, Tensor]:
    kind, words, *rest = np.random.get_state()  # noqa: NPY002 - the legacy state is the one libraries draw from
    assert kind == "MT19937"
    tensors = {
        "random.torch": torch.get_rng_state(),
        "random.numpy": torch.from_numpy(np.asarray(words).astype(np.int64)),
        "random.numpy_rest": torch.tensor([float(x) for x in rest], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def _python_random() -> list[Any]:
    version, words, gauss = random.getstate()
    return [version, list(words), gauss]


def _restore_random(tensors: dict[str, Tensor], python: list[Any]) -> None:
    torch.set_rng_state(tensors["random.torch"].clone())
    words = tensors["random.numpy"].numpy().astype(np.uint32)
    position, has_gauss, gauss = tensors["random.numpy_rest"].tolist()
    np.random.set_state(("MT19937", words, int(position), int(has_gauss), gauss))  # noqa: NPY002
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"random.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{i}"].clone(), i)
    random.setstate((python[0], tuple(python[1]), python[2]))
