"""Checkpoints that mmhub loads as ever and that take less room: written, given their origin, loaded and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mmhub.adapters import adapter_of, merge
from mmhub.checkpoint import load, save
from mmhub.errors import MmhubError
from mmhub.files import write_file
from mmhub.hub.cache import as_table, read_json
from mmhub.hub.card import END, START, read_card
from mmhub.hub.pull import locate, resolve_name
from mmhub.lineage import parent_of
from mmhub.model import Model
from mmhub.weights import SCALE
from mmhub_export.probes import Check, Sample, checked, compared, outputs, require, samples_for
from mmhub_export.record import Export, plain_name


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How weights are stored.

    Attributes:
        state: the tensors to write, by `role.name`, of a model's parts.
        weights: by how much a weight may differ, in units of the largest that shares its row or channel.
        outputs: by how much logits may, in units of the largest; on made-up inputs that is only noted, for noise in
            deep networks ends anywhere.
    """

    format: str
    state: Callable[[Mapping[str, nn.Module]], dict[str, Tensor]]
    weights: float
    outputs: float
    quantized: Literal["", "int8"] = ""


def write_smaller(model: Model, folder: Path, samples: Sequence[Sample], how: Stored) -> Export:
    """Write a checkpoint to an empty folder, load it, and compare its weights and outputs with the model's."""
    adapted = [role for role, part in model.parts().items() if adapter_of(part)]
    if adapted:
        merge(model)
    tensors = how.state(model.parts())
    save(model, folder, tensors, quantized=how.quantized)
    _dress(model, folder, how.format)
    loaded = load(folder)
    before = sum(tensor.nbytes for tensor in _distinct(model))
    facts = {
        "weights": {"bytes": sum(t.nbytes for t in tensors.values()), "bytes_before": before, "types": _types(tensors)},
        **({"merged": adapted} if adapted else {}),
    }
    checks = list(_checks(model, loaded, samples, how))
    require(checks)
    return Export(
        format=how.format,
        name=model.name,
        task=model.task.name,
        modalities=model.modalities,
        checks=checks,
        facts=facts,
        versions={"torch": str(torch.__version__)},
    )


def _distinct(model: Model) -> list[Tensor]:
    """The tensors of a model's state, those that share memory once."""
    return list({(t.data_ptr(), t.shape, t.dtype): t for t in model.state_dict().values()}.values())


def _types(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many numbers are stored as what; scales of codes are not counted."""
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        if not name.endswith(SCALE):
            kind = str(tensor.dtype).removeprefix("torch.")
            found[kind] = found.get(kind, 0) + tensor.numel()
    return found


def _checks(model: Model, loaded: Model, samples: Sequence[Sample], how: Stored) -> Iterator[Check]:
    ours, theirs = model.state_dict(), loaded.state_dict()
    errors = (_distance(tensor.cpu(), theirs[name]) for name, tensor in ours.items())
    yield checked("weights", max(errors, default=0.0), how.weights)
    probes = samples_for(model, samples)
    if probes:
        training = model.training
        wanted = outputs(model.eval(), probes).cpu()
        model.train(training)
        what, tolerance = ("outputs", how.outputs) if samples else ("outputs on made-up inputs", None)
        yield compared(what, wanted, outputs(loaded, probes), tolerance)


def _distance(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors, in units of the largest number."""
    if not mine.is_floating_point() or torch.equal(mine, theirs):
        return 0.0 if torch.equal(mine, theirs) else float("inf")
    return float((mine.float() - theirs.float()).abs().max() / mine.float().abs().max().clamp(min=1e-30))


# -- where it comes from ----------------------------------------------------------------------------------------


def _dress(model: Model, folder: Path, format: str) -> None:
    """Give a checkpoint the card, licence and origin of the model that it was made from."""
    try:
        resolved = resolve_name(model.name)
        source, _ = locate(model.name, resolved)
    except MmhubError:  # it was made in memory
        return
    parent = parent_of(resolved, source, "model")
    for path in source.glob("LICENSE*"):
        shutil.copyfile(path, folder / path.name)
    facts = as_table(read_json(source / "provenance.json"))
    older = [] if parent.get("repo") else [*(facts.get("parents") or ()), *model.parents]
    parents = [one for number, one in enumerate(older) if one not in older[:number]]
    facts["parents"] = [*(one for one in parents if one != parent), parent]
    write_file(folder / "provenance.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    write_file(folder / "README.md", _card(source, plain_name(model.name), format, parent.get("repo", "")))


_STORED = {"safetensors-fp16": "16 bits", "int8": "8 bits"}


def _card(source: Path, name: str, format: str, repo: str) -> str:
    """The original's card, but for what described its own weights; `mmhub push` completes it."""
    import yaml

    path = source / "README.md"
    data, text = read_card(path.read_text(encoding="utf-8") if path.is_file() else "")
    data = {key: value for key, value in data.items() if key != "model-index"} | {"library_name": "mmhub"}
    if repo:
        data |= {"base_model": [repo], "base_model_relation": "quantized"}
    before, _, rest = text.partition(START)
    own = [before.strip() or f"# {name}", rest.partition(END)[2].strip()]
    note = f"The weights are those of `{repo or name}`, stored in {_STORED[format]} by `mmhub export`."
    body = "\n\n".join(part for part in (*own, note) if part and part != note)
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n{body}\n\n{note}\n"
