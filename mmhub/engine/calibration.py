"""Calibration of a trained model on rows it was not trained on. The fit itself is the decoder's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmhub.model import Model


def calibrate(model: Model, measure: Callable[[], Any]) -> float:
    """Let the decoder fit its temperature to what it computes while `measure` runs; return the temperature.

    `measure` evaluates the model on held-out rows. The decoder has `scored`, which gives the logits (N, V) and targets
    (N,) of a batch, and `calibrate`, which takes those of all.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def keep(decoder: Any, given: tuple[Any, ...], output: Any) -> None:
        if given[1] is not None:
            logits, targets = decoder.scored(output, given[1])
            found.append((logits.float().cpu(), targets.cpu()))

    decoder: Any = model.decoder
    handle = decoder.register_forward_hook(keep)
    try:
        measure()
    finally:
        handle.remove()
    logits, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
    temperature: float = decoder.calibrate(logits, targets)
    return temperature
