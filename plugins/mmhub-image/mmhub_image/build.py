"""Build a timm model, also while mmhub puts parameters on the meta device to load a checkpoint without initialising."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn


def build_timm(architecture: str, **options: Any) -> nn.Module:
    """Return `timm.create_model(architecture, **options)` with fresh weights.

    Some timm models compute with their parameters while they are built (Swin's attention masks, hybrid stems). Where
    parameters have no data, those models are built wholly on the meta device, and the tables that no checkpoint holds
    are computed once the weights are loaded.
    """
    try:
        model = _create(architecture, options)
        complete = not _tables_without_data(model)
    except (RuntimeError, NotImplementedError):
        if not nn.Linear(1, 1).weight.is_meta:
            raise
        complete = False
    if not complete:
        with torch.device("meta"):
            model = _create(architecture, options)
        model.register_load_state_dict_post_hook(_compute_tables)  # type: ignore[no-untyped-call]
    return model


def _create(architecture: str, options: dict[str, Any]) -> nn.Module:
    model: nn.Module = timm.create_model(architecture, pretrained=False, **options)
    return model


def _tables_without_data(model: nn.Module) -> list[str]:
    kept = model.state_dict().keys()
    return [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in kept]


def _compute_tables(model: nn.Module, _keys: Any) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # a partial load: there is more to come
    device = next(model.parameters()).device
    for path in sorted({name.rpartition(".")[0] for name in _tables_without_data(model)}):
        module = model.get_submodule(path)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=device))
        module.init_non_persistent_buffers()  # type: ignore[operator]
