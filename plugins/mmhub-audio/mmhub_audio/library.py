"""Read a transformers folder: config.json, preprocessor_config.json and safetensors, never code or pickle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from mmhub.errors import TrustError, UsageError, did_you_mean
from mmhub.hub.integrity import read_index

Value = bool | int | float | str | list[int | float] | None  # what a hyper-parameter may be


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in `folder/name`, {} if there is no such file.

    Raises:
        TrustError: the file is not a JSON object.
    """
    file = folder / name
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrustError(f"'{file}' is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise TrustError(f"'{file}' holds a {type(data).__name__}, expected an object")
    return data


def model_config(folder: Path, model_type: str, component: str) -> dict[str, Any]:
    """Return config.json of a transformers folder after checking its `model_type`."""
    config = read_json(folder, "config.json")
    if not config:
        raise UsageError(
            f"'{folder}' has no config.json, so it is not a transformers folder", "name a folder saved by transformers"
        )
    found = config.get("model_type")
    if found != model_type:
        raise UsageError(
            f"'{folder}' holds a model of type {found!r}, but `{component}` reads {model_type!r}",
            "choose the encoder that matches it with `use`",
        )
    return config


def sampling_rate(preprocessor: Mapping[str, Any], wanted: int, folder: Path) -> int:
    """Return the rate in Hz the model was trained at; an error if the recipe asks for another."""
    rate = preprocessor.get("sampling_rate", wanted)
    if rate != wanted:
        raise UsageError(
            f"the model in '{folder}' was trained at {rate} Hz, not {wanted} Hz", f"set sample_rate = {rate}"
        )
    return wanted


def configure(factory: Any, table: Mapping[str, Value], known: Iterable[str], component: str) -> Any:
    """Build a transformers configuration from a `table` whose keys must be in the allow-list `known`.

    Raises:
        UsageError: a key is not in the list, or transformers refuses a value.
    """
    _check_keys(table, known, component)
    try:
        return factory(**table)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UsageError(f"{component}: {' '.join(str(error).split())}", "correct the `config` table") from None


def _check_keys(table: Mapping[str, Value], known: Iterable[str], component: str) -> None:
    known = sorted(known)
    for key in table:
        if key not in known:
            hint = did_you_mean(key, known) or f"known keys: {', '.join(known)}"
            raise UsageError(f"the `config` table of {component} takes no {key!r}", hint)


def build(factory: Any, hyper: Any, component: str) -> Any:
    """Build a transformers module, and answer for hyper-parameters that do not go together."""
    try:
        return factory(hyper)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{component}: these hyper-parameters make no model: {error}", "check `config`") from None


def read_tensors(folder: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Read the tensors of one sub-module as float32, without touching the rest of the file.

    `prefixes` are tried in order; the first that any tensor starts with is removed from the names.
    """
    where = _tensor_files(folder)
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in where)), None)
    if prefix is None:
        raise UsageError(f"'{folder}' holds no tensors named '{prefixes[0]}...'", "check that it is the right model")
    names = [name for name in where if name.startswith(prefix)]
    tensors: dict[str, Tensor] = {}
    for file in sorted({where[name] for name in names}):
        with _open(file) as content:
            for name in names:
                if where[name] == file:
                    tensors[name[len(prefix) :]] = content.get_tensor(name).to(torch.float32)
    return tensors


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Map each tensor's name to the file that holds it."""
    shards = read_index(folder)
    if shards:
        return {name: folder / file for name, file in shards.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise UsageError(
            f"'{folder}' has no model.safetensors", "mmhub reads safetensors alone: convert the model with transformers"
        )
    with _open(single) as content:
        return dict.fromkeys(content.keys(), single)


def _open(file: Path) -> Any:
    try:
        return safetensors.safe_open(str(file), framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise TrustError(f"'{file}' is not a whole safetensors file: {error}") from None


def load_exactly(module: torch.nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Put `tensors` into a module built on the meta device; names and shapes must match one to one.

    Raises:
        UsageError: the folder's weights do not fit its configuration, or the recipe's changes to it.
    """
    wanted = module.state_dict()
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    wrong = sorted(n for n in wanted.keys() & tensors.keys() if wanted[n].shape != tensors[n].shape)
    for what, names in (("lack", missing), ("have the unknown", extra), ("have another shape for", wrong)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UsageError(
                f"the weights in '{folder}' {what} {names[0]!r}{more}", "leave sizes out of the `config` table"
            )
    counters = {n: tensors[n].to(wanted[n].dtype) for n in wanted if not wanted[n].is_floating_point()}
    module.load_state_dict({**tensors, **counters}, assign=True)
