"""Calibration: one temperature, by which logits are divided so that scores are as often right as they say."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch
from torch import Tensor

from mmhub.batch import Output
from mmhub.errors import UsageError

LOWEST, HIGHEST = 0.05, 20.0  # temperatures; rows that are all right, or that say nothing, would lead to 0 or infinity
_HALVINGS = 60


class Calibrated:
    """What heads share whose configuration has `calibrate` and `temperature`. Answers stay, their scores change.

    Attributes:
        temperature: what logits are divided by before they become scores.
    """

    config: Any
    temperature: float

    @property
    def calibrates(self) -> bool:
        """Whether `calibrate` is to be called on held-out rows once training has ended."""
        return bool(self.config.calibrate)

    def scored(self, output: Output, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, V) and targets (N,) of what is scored in a batch, for `calibrate`."""
        return output.logits, targets

    def calibrate(self, logits: Tensor, targets: Tensor) -> float:
        """Set the temperature, also in the configuration, to what fits these logits (N, V) best; return it."""
        self.temperature = fit_temperature(logits, targets)
        self.config = msgspec.structs.replace(self.config, temperature=self.temperature)
        return self.temperature


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless logits can be divided by it."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature t at which softmax(logits / t) gives the targets the highest likelihood.

    logits (N, V), targets (N,) long of rows that were not trained on (Guo et al. 2017, arXiv:1706.04599). The mean
    -log P is convex in 1/t, so that bisection of its slope finds the minimum; t lies between 0.05 and 20.

    Raises:
        UsageError: there is no row, or a logit is not finite.
    """
    if not len(targets):
        raise UsageError("calibration needs at least 1 held-out row", "give data.valid or data.valid_fraction")
    logits = logits.detach().cpu().double()  # some devices know no fp64
    if not bool(torch.isfinite(logits).all()):
        raise UsageError("the model's logits are not finite", "train it again with a lower learning rate")
    right = logits.gather(1, targets.cpu()[:, None])
    low, high = math.log(1 / HIGHEST), math.log(1 / LOWEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        slope = ((logits * math.exp(middle)).softmax(1) * logits).sum(1, keepdim=True) - right
        low, high = (low, middle) if float(slope.mean()) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)
