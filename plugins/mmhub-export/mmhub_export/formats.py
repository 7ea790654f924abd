"""The formats, each written by a function that is imported only when it is asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmhub.model import Model
    from mmhub_export.record import Export

# format: module:function(model, folder, samples) -> Export; samples are raw inputs to check with, [] for made-up ones
FORMATS = {
    "onnx": "mmhub_export.onnx_graphs:write_onnx",
    "torch-export": "mmhub_export.programs:write_programs",
    "transformers": "mmhub_export.layouts:write_transformers",
    "safetensors-fp16": "mmhub_export.halves:write_fp16",
    "int8": "mmhub_export.eighths:write_int8",
}
LOADABLE = ("safetensors-fp16", "int8")  # what `mmhub.load` reads


def write_format(format: str, model: Model, folder: Path, samples: list[dict[str, Any]]) -> Export:
    """Write a model in a format to an empty folder, and compare what was written with the model.

    Raises:
        UsageError: the format cannot hold this model. TrustError: what was written answers otherwise.
    """
    module, _, function = FORMATS[format].partition(":")
    found: Export = getattr(import_module(module), function)(model, folder, samples)
    return found
