"""Training-time variation of a picture, a pure function of the picture and a generator.

| name     | what a training picture goes through |
|----------|--------------------------------------|
| `none`   | nothing: the evaluation transform |
| `crop`   | shifted, scaled and stretched a little; safe for digits, text and diagrams (default) |
| `flip`   | `crop`, and mirrored left to right half of the time; for photographs |
| `strong` | `flip` with wider crops, colour changes and an erased rectangle; for small data and long training |
| `timm`   | timm's own training transform of the model |

A table instead of a name is timm's training transform with other settings: see `TimmAugment`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor

from mmhub.interfaces import ComponentConfig

_Chance = Annotated[float, msgspec.Meta(ge=0, le=1)]


class TimmAugment(ComponentConfig, frozen=True):
    """Settings of timm's training transform, with its defaults: a random part of the picture, resized.

    `policy` is one of timm's strings, such as "rand-m9-mstd0.5-inc1" (RandAugment, Cubuk et al., arXiv:1909.13719),
    "augmix-m5-w4-d2" (Hendrycks et al., arXiv:1912.02781), "v0" or "3a" (AutoAugment); '' for none. `scale` is the
    share of the picture's area that is shown, `ratio` width / height of that part, `flip` the probability of mirroring
    left to right. `colour` changes brightness, contrast and saturation by up to that share; None is 0.4, or nothing
    beside a policy. `erase` is the probability that a rectangle is erased (Zhong et al., arXiv:1708.04896).
    """

    policy: str = ""
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: _Chance = 0.5
    colour: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    erase: _Chance = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two shares of the area, the smaller first, got {list(self.scale)}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be two numbers above 0, the smaller first, got {list(self.ratio)}")
        for part in self.policy.split("-")[1:]:
            if not any(map(str.isdigit, part)) and not part.startswith("t"):  # timm would ignore it
                raise ValueError(f"timm has no policy {self.policy!r}: {part!r} lacks its number")
        try:
            TimmTransform(self, (32, 32), (0.5, 0.5, 0.5), "bicubic")
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            reason = str(error) or "it begins with rand-, augmix-, original, v0 or 3a"
            raise ValueError(f"timm has no policy {self.policy!r}: {reason}") from None


Augment = Literal["none", "crop", "flip", "strong", "timm"] | TimmAugment
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the picture


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Ranges of an augmentation; sizes and shifts are fractions of the side of the evaluation crop."""

    scale: tuple[float, float] = (1.0, 1.0)
    stretch: float = 1.0  # the aspect ratio changes by up to this factor
    shift: float = 0.0
    flip: float = 0.0  # probability
    colour: float = 0.0  # brightness, contrast and saturation change by up to this fraction
    erase: float = 0.0  # probability


RECIPES: dict[str, Recipe] = {
    "crop": Recipe(scale=(0.85, 1.1), stretch=1.1, shift=0.1),
    "flip": Recipe(scale=(0.85, 1.1), stretch=1.1, shift=0.1, flip=0.5),
    "strong": Recipe(scale=(0.6, 1.1), stretch=1.25, shift=0.15, flip=0.5, colour=0.3, erase=0.25),
}


class TimmTransform:
    """timm's training transform from a picture to uint8 (3, H, W).

    What is erased gets the colour `mean`, as in timm where it is 0 once pixels are normalised.
    """

    def __init__(self, settings: TimmAugment, size: tuple[int, int], mean: Sequence[float], interpolation: str) -> None:
        colour = 0.4 if settings.colour is None else settings.colour
        self._vary: Any = transforms_imagenet_train(
            size,
            scale=settings.scale,
            ratio=settings.ratio,
            hflip=settings.flip,
            color_jitter=colour or None,
            force_color_jitter=settings.colour is not None,
            auto_augment=settings.policy or None,
            # rotating and shearing know no other kinds
            interpolation=interpolation if interpolation in ("nearest", "bilinear", "bicubic") else "bicubic",
            mean=tuple(mean),
            normalize=False,
        )
        self._hide = RandomErasing(settings.erase, device="cpu") if settings.erase else None
        self._fill = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)[:, None, None]

    def __call__(self, image: Image.Image, rng: torch.Generator) -> Tensor:
        with _seeded(rng):
            pixels: Tensor = self._vary(image)
            if self._hide is None:
                return pixels
            seen = self._hide(torch.ones(1, *pixels.shape[1:], dtype=torch.uint8)).bool()
            return torch.where(seen, pixels, self._fill)


@contextmanager
def _seeded(rng: torch.Generator) -> Iterator[None]:
    """Let Python's, numpy's and torch's global random numbers, which timm draws, follow from `rng` inside the block."""
    seed = int(torch.randint(2**31, (1,), generator=rng))
    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(tensor)


class Draw:
    """Uniform numbers from the generator, in the order they are asked for."""

    def __init__(self, rng: torch.Generator) -> None:
        self._numbers = iter(torch.rand(16, generator=rng, dtype=torch.float64).tolist())

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(next(self._numbers))

    def chance(self, probability: float) -> bool:
        return float(next(self._numbers)) < probability


def vary_box(box: Box, recipe: Recipe, draw: Draw) -> Box:
    """Return a box near `box`: scaled, stretched and shifted; it may reach over the picture's edge."""
    left, top, right, bottom = box
    scale = draw.between(*recipe.scale)
    stretch = math.exp(draw.between(-1.0, 1.0) * math.log(recipe.stretch) / 2)
    width, height = (right - left) * scale * stretch, (bottom - top) * scale / stretch
    # A smaller crop may lie anywhere in the evaluation crop; `shift` reaches beyond it.
    roam_x = recipe.shift * (right - left) + max(0.0, (right - left) - width) / 2
    roam_y = recipe.shift * (bottom - top) + max(0.0, (bottom - top) - height) / 2
    x = (left + right) / 2 + draw.between(-roam_x, roam_x)
    y = (top + bottom) / 2 + draw.between(-roam_y, roam_y)
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def cut(
    image: Image.Image, box: Box, size: tuple[int, int], resample: Image.Resampling, fill: tuple[int, int, int]
) -> Image.Image:
    """Resize the part of `image` in `box` to `size` (width, height); what lies outside the picture is `fill`."""
    left, top, right, bottom = box
    outer = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    inner = (max(outer[0], 0), max(outer[1], 0), min(outer[2], image.width), min(outer[3], image.height))
    if inner != outer:
        canvas = Image.new("RGB", (outer[2] - outer[0], outer[3] - outer[1]), fill)
        if inner[0] < inner[2] and inner[1] < inner[3]:
            canvas.paste(image.crop(inner), (inner[0] - outer[0], inner[1] - outer[1]))
        image, box = canvas, (left - outer[0], top - outer[1], right - outer[0], bottom - outer[1])
    return image.resize(size, resample, box=box)


def vary_colour(pixels: Tensor, amount: float, draw: Draw) -> Tensor:
    """Change brightness, contrast and saturation of (3, H, W) in [0, 1] by factors within 1 +- `amount`."""
    brightness, contrast, saturation = (draw.between(1 - amount, 1 + amount) for _ in range(3))
    pixels = pixels * brightness
    pixels = (pixels - pixels.mean()) * contrast + pixels.mean()
    grey = pixels.mean(0, keepdim=True)
    return ((pixels - grey) * saturation + grey).clamp(0, 1)


def erase(pixels: Tensor, fill: Sequence[float], draw: Draw) -> Tensor:
    """Fill one random rectangle of 2 to 20 % of (3, H, W) with `fill`, as Zhong et al. 2017 (arXiv:1708.04896)."""
    _, height, width = pixels.shape
    area, ratio = draw.between(0.02, 0.2), math.exp(draw.between(-1.0, 1.0))
    h = min(max(round(height * math.sqrt(area * ratio)), 1), height)
    w = min(max(round(width * math.sqrt(area / ratio)), 1), width)
    top, left = int(draw.between(0, height - h + 1)), int(draw.between(0, width - w + 1))
    pixels = pixels.clone()
    pixels[:, top : top + h, left : left + w] = torch.tensor(fill)[:, None, None]
    return pixels
