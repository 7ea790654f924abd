"""A checkpoint with its weights in 8 bits: about a quarter of the bytes, and fp32 again when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmhub.model import Model
from mmhub.weights import quantized_state
from mmhub_export.record import Export
from mmhub_export.smaller import Stored, write_smaller


def write_int8(model: Model, folder: Path, samples: Sequence[Mapping[str, Any]]) -> Export:
    """Write a checkpoint whose larger matrices are integers from -127 to 127, with a scale for each output or word.

    What is loaded is an ordinary model in fp32, which predicts and is trained as ever. Low-rank adapters are merged
    first, in place. Versions of mmhub before format 2 say that they are too old for it.

    Raises:
        UsageError: the model's weights are packed (`mmhub.load(..., quantize=...)`).
        TrustError: a weight is no number, or what was written answers quite otherwise than the model.
    """
    kind = Stored(format="int8", state=quantized_state, quantized="int8", weights=1 / 127, outputs=0.25)
    return write_smaller(model, folder, samples, kind)
