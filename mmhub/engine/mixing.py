"""Mixup and CutMix: pictures of a training batch mixed in pairs, and their labels in the same shares.

Python's own generator is drawn from, as by anything random in a step: `mmhub.optim.seed_step` seeds it by the recipe's
seed, the step and the rank, so that a resumed run draws the same.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmhub.batch import Batch
from mmhub.config import TrainRecipe
from mmhub.errors import UsageError
from mmhub.model import Model


def make_mixer(model: Model, options: TrainRecipe) -> Mixer | None:
    """Return what mixes the batches of a run, None where the recipe does not ask for it.

    Raises:
        UsageError: the model takes other inputs than pictures, its features are kept, or its answers cannot be mixed.
    """
    if not options.mixup and not options.cutmix:
        return None
    key = "train.mixup" if options.mixup else "train.cutmix"
    if model.modalities != ("image",):
        raise UsageError(f"{key} mixes pictures, and this model takes {', '.join(model.modalities)}", f"remove {key}")
    if model.decoder.soft_targets(torch.zeros(1, dtype=torch.long)) is None:
        hint = f"remove {key}; it is for classification and multilabel"
        raise UsageError(f"{key} mixes labels, and those of {model.sources['decoder'].id} cannot be", hint)
    if "image" in model.frozen and options.cache_features:
        hint = "train the encoder, or set train.cache_features = false"
        raise UsageError(f"{key} changes pictures, and the features of the frozen encoder are kept", hint)
    return Mixer(model, options.mixup, options.cutmix)


@dataclass(frozen=True)
class Mixer:
    """Mix each row of a batch with another: by mixup (arXiv:1710.09412), CutMix (arXiv:1905.04899), or one of both.

    `mixup` and `cutmix` are the alphas of Beta(alpha, alpha), from which the share of the first picture is drawn, one
    for a batch; 0 = not this one.
    """

    model: Model
    mixup: float
    cutmix: float

    @torch.no_grad()
    def mix(self, batch: Batch) -> Batch:
        """Return the batch with mixed pictures, in normalised floats, and targets (B, V).

        Raises:
            UsageError: a row has not exactly one picture, or the encoder takes whole numbers only.
        """
        if batch.size < 2:
            return batch
        items = batch.items["image"]
        if len(items) != batch.size:
            problem = f"mixup and cutmix are for one picture a row, and {batch.size} rows have {len(items)}"
            raise UsageError(problem, "remove train.mixup and train.cutmix")
        pixels = self._normalised(items.data)
        order = torch.tensor(random.sample(range(batch.size), batch.size), device=pixels.device)
        cut = bool(self.cutmix) and (not self.mixup or random.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = random.betavariate(alpha, alpha)
        if cut:
            pixels, share = _cut(pixels, order, share)
        else:
            pixels = pixels * share + pixels[order] * (1 - share)
        targets = self.model.decoder.soft_targets(batch.targets)
        assert targets is not None, "make_mixer has asked"
        targets = targets * share + targets[order] * (1 - share)
        return replace(batch, items={"image": replace(items, data=pixels)}, targets=targets)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Pixels as numbers that can be mixed without rounding: bytes are what the encoder makes of them first."""
        if pixels.is_floating_point():
            return pixels
        normalise = getattr(self.model.encoders["image"], "normalise", None)
        if normalise is None:
            component = self.model.sources["image_encoder"].id
            raise UsageError(f"{component} takes pixels as whole numbers, which cannot be mixed", "remove train.mixup")
        found: Tensor = normalise(pixels)
        return found


def _cut(pixels: Tensor, order: Tensor, share: float) -> tuple[Tensor, float]:
    """Put a box of the second pictures into the first; return them and the share of pixels that stayed.

    The box has the shape of the picture, its centre is anywhere, and what is outside of the picture is cut off.
    """
    height, width = pixels.shape[-2:]
    top, bottom = _span(height, share)
    left, right = _span(width, share)
    mixed = pixels.clone()
    mixed[..., top:bottom, left:right] = pixels[order, ..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _span(size: int, share: float) -> tuple[int, int]:
    half = int(size * math.sqrt(1 - share)) // 2
    middle = random.randrange(size)
    return max(middle - half, 0), min(middle + half, size)
