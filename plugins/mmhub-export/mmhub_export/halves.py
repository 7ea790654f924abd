"""A checkpoint with its weights in 16 bits: half the bytes, and fp32 again when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmhub.model import Model
from mmhub.weights import state_of
from mmhub_export.record import Export
from mmhub_export.smaller import Stored, write_smaller

_LARGEST = torch.finfo(torch.float16).max


def write_fp16(model: Model, folder: Path, samples: Sequence[Mapping[str, Any]]) -> Export:
    """Write a checkpoint whose matrices are in fp16, or in bf16 where one holds a number above 65504.

    Vectors and buffers stay as they are: they take little room, and norms need their precision. Low-rank adapters are
    merged first, in place. Every version of mmhub loads it.

    Raises:
        UsageError: the model's weights are packed (`mmhub.load(..., quantize=...)`).
        TrustError: what was written answers otherwise than the model.
    """
    return write_smaller(
        model, folder, samples, Stored(format="safetensors-fp16", state=half_state, weights=2**-8, outputs=1e-2)
    )


def half_state(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """As `mmhub.weights.state_of`, with each parameter of at least two dimensions from fp32 to fp16 or bf16."""
    state, _ = state_of(parts)
    names = {
        f"{role}.{key}" for role, part in parts.items() for key, _ in part.named_parameters(remove_duplicate=False)
    }
    return {name: _half(tensor) if name in names else tensor for name, tensor in state.items()}


def _half(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32 or tensor.ndim < 2 or not tensor.numel():
        return tensor
    return tensor.to(torch.bfloat16 if tensor.abs().max() > _LARGEST else torch.float16)
