"""Low-rank adapters of a part (LoRA): put in through peft, kept apart from the weights they change, merged into them.

A part that started from published weights is saved as its adapter alone, in PEFT's own two files, and as the name and
identity of those weights, its base. How a base is found and loaded is left to `mmhub.checkpoint` and `mmhub.hub`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor, nn

from mmhub.config import LoraRecipe
from mmhub.errors import PluginError, TrustError, UsageError, did_you_mean
from mmhub.files import write_file
from mmhub.model import Model
from mmhub.names import resolve
from mmhub.weights import all_finite, read_tensors, write_tensors

_KEY = "_mmhub_adapter"  # a part's record, as a plain attribute
_LORA = re.compile(r"(.+)\.lora_([AB])\.default\.weight")
_PEFT = "base_model.model."  # what names in PEFT's files begin with
# Query and value projections, which Hu et al. adapt, by the names that libraries give them.
_USUAL = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"), ("Wqkv",))


class BaseRecord(msgspec.Struct, omit_defaults=True):
    """The weights an adapter is for.

    Attributes:
        name: a repository on the Hub, or the path of a folder or file. component: the part of an mmhub checkpoint,
            where it has another name there.
        commit: of a repository. sha256: of anything local, as `mmhub.lineage.digest` says it.
    """

    name: str
    commit: str = ""
    sha256: str = ""
    component: str = ""


class AdapterRecord(msgspec.Struct, omit_defaults=True):
    """An adapter in config.json. `weights` is its file; without one, all of the part's tensors are in its own file."""

    rank: int
    alpha: float
    targets: list[str]
    dropout: float = 0.0
    base: BaseRecord | None = None
    weights: str = ""


def adapter_of(part: nn.Module) -> AdapterRecord | None:
    """Return what is known of a part's adapter, None if it has none."""
    found: AdapterRecord | None = part.__dict__.get(_KEY)
    return found


# -- putting one in ---------------------------------------------------------------------------------------------


def apply_lora(model: Model, role: str, recipe: LoraRecipe, init: str = "") -> None:
    """Freeze a part and give its linear layers adapters in fp32, which alone are trained (arXiv:2106.09685).

    `init` names what the part's weights are, as `model.parents` pins it; '' for fresh ones, which are saved with the
    adapter. The recipe's targets are ends of layers' names; none stands for those usual for a transformers model.

    Raises:
        UsageError: a target names no linear layer, or one whose weights are shared; or the part has an adapter.
        PluginError: peft is not installed.
    """
    part = model.parts()[role]
    if adapter_of(part) is not None:
        raise UsageError(
            f"the {role} has a low-rank adapter already", "leave lora out to train that one, or merge it first"
        )
    if recipe.rank < 1 or not 0 < recipe.alpha < float("inf") or not 0 <= recipe.dropout < 1:
        raise UsageError(f"the lora of the {role} needs rank >= 1, alpha > 0 and dropout in [0, 1)", "correct it")
    targets = _known_targets(part, role, recipe.targets) if recipe.targets else _usual_targets(part, role)
    record = AdapterRecord(recipe.rank, recipe.alpha, targets, recipe.dropout, _base(model, role, init))
    inject(part, record)


def inject(part: nn.Module, record: AdapterRecord, *, empty: bool = False) -> None:
    """Put adapters into a part, in place; on the meta device if `empty`, else drawn anew.

    A layer `x` becomes `x.base_layer`, beside `x.lora_A.default` and `x.lora_B.default`.

    Raises:
        PluginError: peft is not installed. TrustError: the part has no such layer.
    """
    peft = _peft()
    layers = {name: layer for name, layer in _layers(part) if _is_target(part, name, record.targets)}
    if not layers:
        raise TrustError(
            f"an adapter for {', '.join(record.targets)} finds no such layer", "fetch the checkpoint again"
        )
    holder = nn.Module()  # peft would take the `config` of a part of ours for one of transformers
    holder.part = part
    config = peft.LoraConfig(
        r=record.rank,
        lora_alpha=record.alpha,
        lora_dropout=record.dropout,
        target_modules=[f"part.{name}" for name in layers],
        fan_in_fan_out=all(not isinstance(layer, nn.Linear) for layer in layers.values()),
    )
    peft.inject_adapter_in_model(config, holder, low_cpu_mem_usage=empty)
    for name, parameter in part.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.float()
    part.__dict__[_KEY] = msgspec.structs.replace(record, weights="")


def is_adapter(name: str) -> bool:
    """Say by its name whether a tensor belongs to an adapter."""
    return _LORA.fullmatch(name) is not None


def check_peft() -> None:
    """Raise PluginError where peft is not installed; it is not imported, which takes seconds."""
    if "peft" not in sys.modules and find_spec("peft") is None:
        raise PluginError("low-rank adapters need peft, which is not installed", "pip install 'mmhub[lora]'")


def _peft() -> Any:
    check_peft()
    import peft

    return peft


def _layers(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that can have an adapter: linear ones that are called, also in GPT-2's notation."""
    inside = {id(child) for one in part.modules() if isinstance(one, nn.MultiheadAttention) for child in one.modules()}
    for name, module in part.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and id(module) not in inside:
            yield name, module


def _is_target(part: nn.Module, name: str, targets: Sequence[str]) -> bool:
    prefix = _inner(part)
    return name.startswith(prefix) and any(f".{name}".endswith(f".{target}") for target in targets)


def _inner(part: nn.Module) -> str:
    """Where in a part its one model of transformers is, as a prefix of names; '' where there is none."""
    library: Any = sys.modules.get("transformers")
    found: list[str] = []
    for name, module in part.named_modules():
        is_model = library is not None and isinstance(module, library.PreTrainedModel)
        if is_model and not any(name.startswith(outer) for outer in found):
            found.append(f"{name}.")
    return found[0] if len(found) == 1 else ""


def _known_targets(part: nn.Module, role: str, targets: Sequence[str]) -> list[str]:
    layers = dict(_layers(part))
    for target in targets:
        named = [name for name in layers if _is_target(part, name, [target])]
        if not named:
            ends = sorted({name.rpartition(".")[2] for name in layers})
            hint = did_you_mean(target, ends) or f"its linear layers are {', '.join(ends) or 'none'}"
            raise UsageError(f"the {role} has no linear layer {target!r} for an adapter", hint)
        owners: dict[int, int] = {}
        for module in part.modules():
            for parameter in module._parameters.values():
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        shared = [name for name in named if owners[id(layers[name].weight)] > 1]
        if shared:
            raise UsageError(
                f"the {role}'s layer {shared[0]!r} shares its weights with another, which an adapter would separate",
                f"leave {target!r} out of targets",
            )
    return list(targets)


def _usual_targets(part: nn.Module, role: str) -> list[str]:
    """What peft says for the type of model, else the usual names of attention's projections."""
    prefix, ends = _inner(part), {name.rpartition(".")[2] for name, _ in _layers(part)}
    model: Any = part.get_submodule(prefix.rstrip("."))
    kind = model.config.model_type if prefix else ""
    known = _peft().utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    usual = [list(known)] if isinstance(known, list) else []
    for names in (*usual, *map(list, _USUAL)) if prefix else ():
        if ends.issuperset(names):
            return names
    raise UsageError(
        f"it is not known which layers of the {role} should have an adapter",
        f"name some of its linear layers in targets: {', '.join(sorted(ends)) or 'it has none'}",
    )


def _base(model: Model, role: str, init: str) -> BaseRecord | None:
    facts = next((facts for facts in model.parents if facts["part"] in (role, "model")), {})
    if not init or not facts.keys() & {"commit", "sha256"}:
        return None
    resolved = resolve(init)
    name = resolved.repo_id if resolved.kind == "hub" else os.path.realpath(resolved.path or "")
    assert name
    component = resolved.component or ""
    return BaseRecord(name, facts.get("commit", ""), facts.get("sha256", ""), component)


# -- merging ----------------------------------------------------------------------------------------------------


def merge(model: Model) -> Model:
    """Add all adapters to the weights they change, in place; the parts are plain again, and wholly trained.

    Raises:
        UsageError: there is no adapter.
    """
    adapted = {role: part for role, part in model.parts().items() if adapter_of(part) is not None}
    if not adapted:
        raise UsageError(f"'{model.name or 'the model'}' has no low-rank adapter to merge", "use it as it is")
    _peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    for role, part in adapted.items():
        layers = [(name, layer) for name, layer in part.named_modules() if isinstance(layer, BaseTunerLayer)]
        for name, layer in layers:
            layer.merge(safe_merge=True)
            owner, _, leaf = name.rpartition(".")
            setattr(part.get_submodule(owner), leaf, layer.get_base_layer())
        part.requires_grad_(True)
        record: AdapterRecord = part.__dict__.pop(_KEY)
        if record.base and not any(parent["part"] in (role, "model") for parent in model.parents):
            model.parents = [*model.parents, _parent(role, record.base)]
    return model


def _parent(role: str, base: BaseRecord) -> dict[str, str]:
    """A base as `mmhub.lineage.parent_of` describes what weights start from."""
    if base.commit:
        return {"part": role, "name": base.name, "repo": base.name, "commit": base.commit}
    return {"part": role, "name": Path(base.name).name, "sha256": base.sha256}


# -- files ------------------------------------------------------------------------------------------------------


def write_adapters(
    parts: Mapping[str, nn.Module], state: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, Tensor], dict[str, AdapterRecord]]:
    """Write the adapters of all parts that have a base; return the tensors still to be written, and records by role.

    `state` holds the model's tensors by `role.name`. Of a part with a base only buffers are left, for training may
    change them. The files are what PEFT reads; where several parts have one, their names end in the role.
    """
    adapted = {role: record for role, part in parts.items() if (record := adapter_of(part)) and record.base}
    rest, written = dict(state), {}
    for role, record in adapted.items():
        end = f"-{role}" if len(adapted) > 1 else ""
        written[role] = msgspec.structs.replace(record, weights=f"adapter_model{end}.safetensors")
        names = {f"{role}.{key}": peft_name for key, peft_name in _peft_names(parts[role]).items()}
        tensors = {peft_name: rest[name] for name, peft_name in names.items()}
        write_tensors(tensors, folder / written[role].weights)
        write_file(folder / f"adapter_config{end}.json", _peft_config(parts[role], record))
        for name in [f"{role}.{key}" for key, _ in parts[role].named_parameters(remove_duplicate=False)]:
            rest.pop(name, None)
    return rest, written


def read_adapter(role: str, part: nn.Module, path: Path) -> dict[str, Tensor]:
    """Read the file of a part's adapter, as `role.name`; the part has places for its tensors.

    Raises:
        TrustError: the file is damaged, or holds other tensors.
    """
    names = {peft_name: f"{role}.{key}" for key, peft_name in _peft_names(part).items()}
    found = dict(read_tensors(path))
    odd = sorted(found.keys() ^ names.keys())
    if odd:
        what = "lacks" if odd[0] in names else "holds an unexpected"
        raise TrustError(f"'{path}' {what} tensor {odd[0]!r}", "fetch the checkpoint again")
    if not all_finite(found.values()):
        raise TrustError(f"'{path}' holds NaN or infinity", "the model was saved broken: use another")
    return {names[name]: tensor for name, tensor in found.items()}


def _peft_names(part: nn.Module) -> dict[str, str]:
    """PEFT's names for the tensors of a part's adapter, by our own."""
    prefix = _inner(part)
    names = {}
    for key, _ in part.named_parameters():
        match = _LORA.fullmatch(key)
        if match:
            names[key] = f"{_PEFT}{match[1].removeprefix(prefix)}.lora_{match[2]}.weight"
    return names


def _peft_config(part: nn.Module, record: AdapterRecord) -> str:
    """The content of adapter_config.json; a base on this machine is not named, for PEFT keeps paths as they are."""
    assert record.base is not None
    table = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": record.base.name if record.base.commit else None,
        "revision": record.base.commit or None,
        "inference_mode": True,
        "r": record.rank,
        "lora_alpha": record.alpha,
        "lora_dropout": record.dropout,
        "target_modules": record.targets,
        "fan_in_fan_out": any(getattr(module, "fan_in_fan_out", False) for module in part.modules()),
        "bias": "none",
    }
    return json.dumps(table, indent=2) + "\n"
