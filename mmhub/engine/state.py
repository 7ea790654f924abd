"""Resumable checkpoints: a model folder, optimizer state and position, each in a fresh folder.

Weights and states are safetensors and JSON. There is no random state: each step is seeded by its own number. A manifest
with hashes is written last; a folder without a valid one is not used. These folders are never published.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from mmhub.checkpoint import load
from mmhub.errors import MmhubError, TrustError
from mmhub.files import disk_errors, new_folder, sha256, write_file
from mmhub.model import Model
from mmhub.weights import copy_parameters, read_tensors


class Position(msgspec.Struct):
    """How far a run has come. Steps are optimizer steps; `batches` counts those of the current epoch."""

    step: int = 0
    epoch: int = 0
    batches: int = 0
    best: float | None = None
    best_loss: float = 0.0
    best_step: int = 0
    evaluations_without_gain: int = 0
    skipped: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0  # since the last line in metrics.jsonl
    loss_steps: int = 0
    evaluated_step: int = -1
    lines: int = 0  # in metrics.jsonl
    rows: int = 0  # of the training data
    parents: list[dict[str, str]] = []  # what the weights started from


def step_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08}"


def save_state(folder: Path, model: Model, optimizer: torch.optim.Optimizer, position: Position, keep: int) -> Path:
    """Write the checkpoint of this step under `folder` and drop all but the newest `keep`."""
    from safetensors.torch import save_file

    target = folder / step_name(position.step)
    with disk_errors("a training checkpoint", folder), new_folder(target) as aside:
        model.save(aside / "model")
        save_file(_optimizer_tensors(optimizer), aside / "state.safetensors")
        (aside / "state.safetensors").chmod(0o644)
        write_file(aside / "state.json", json.dumps(msgspec.to_builtins(position)))
        files = sorted(p for p in aside.rglob("*") if p.is_file())
        hashes = {path.relative_to(aside).as_posix(): sha256(path) for path in files}
        write_file(aside / "manifest.json", json.dumps(hashes, indent=1))
    for old in (*_steps(folder)[keep:], *_leftovers(folder)):
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
    """Restore the optimizer's state; return the position."""
    _restore_optimizer(optimizer, dict(read_tensors(path / "state.safetensors")))
    return msgspec.json.decode((path / "state.json").read_bytes(), type=Position)


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders, newest step first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def _leftovers(folder: Path) -> list[Path]:
    """What a killed process was about to write."""
    return list(folder.glob(".step-*.tmp"))


def _damage(path: Path) -> str | None:
    try:
        hashes = json.loads((path / "manifest.json").read_text())
        for name, expected in hashes.items():
            if not (path / name).is_file():
                return f"{name} is missing"
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
