"""Pictures to pixels: timm's evaluation transform, and augmentation in training.

Pixels stay uint8, a quarter of the bytes that workers hand over and a GPU is sent; the encoder normalises them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import msgspec
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mmhub.errors import InputError
from mmhub.interfaces import ComponentConfig, Policy, Processor, decode_config, describe_raw
from mmhub_image.augment import (
    RECIPES,
    Augment,
    Box,
    Draw,
    Recipe,
    TimmAugment,
    TimmTransform,
    cut,
    erase,
    vary_box,
    vary_colour,
)
from mmhub_image.decode import open_image


class ImageProcessor(Processor):
    """Decode, resize and crop pictures to uint8 (3, H, W), as timm does for evaluation.

    In training, `augment` varies them (see `mmhub_image.augment`), a pure function of picture and seed. What changes
    colours ("strong") gives float32 that is normalised already: rounding it to uint8 would lose something.
    """

    modality = "image"
    fixed_length = True

    class Settings(ComponentConfig, frozen=True):
        """The whole state. `mean` and `std` are of pixels in [0, 1]; `crop_pct` is the part of a side that is kept."""

        image_size: tuple[int, int]  # height, width
        mean: tuple[float, float, float]
        std: tuple[float, float, float]
        interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] = "bicubic"
        crop_pct: float = 0.875
        crop_mode: Literal["center", "squash", "border"] = "center"
        augment: Augment = "crop"

        def __post_init__(self) -> None:
            if min(self.image_size) < 1 or not 0 < self.crop_pct <= 4 or min(self.std) <= 0:
                raise ValueError("image_size and std must be positive, and crop_pct between 0 and 4")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.augments = settings.augment != "none"
        own = TimmAugment() if settings.augment == "timm" else settings.augment
        self._timm = (
            TimmTransform(own, settings.image_size, settings.mean, settings.interpolation)
            if isinstance(own, TimmAugment)
            else None
        )
        self._evaluate = create_transform(
            input_size=(3, *settings.image_size),
            is_training=False,
            interpolation=settings.interpolation,
            mean=settings.mean,
            std=settings.std,
            crop_pct=settings.crop_pct,
            crop_mode=settings.crop_mode,
            normalize=False,  # stops at uint8
        )

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        """Return pixels, uint8 (3, H, W), or normalised float32 where their colours were varied."""
        image = open_image(raw, policy)
        if rng is None or not self.augments:
            self._check_shape(image, policy, raw)
            pixels: Tensor = self._evaluate(image)
            return pixels
        if self._timm is not None:
            return self._timm(image, rng)
        return self._augmented(image, RECIPES[str(self.settings.augment)], Draw(rng))

    def length(self, raw: Any, policy: Policy) -> int:
        """Return 1: a picture is one raw position."""
        return 1

    def pack(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Stack to (N, 3, H, W); a picture is one raw position, so the mask is (N, 1)."""
        return torch.stack(list(items)), torch.ones(len(items), 1, dtype=torch.bool)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self.settings))
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls(decode_config(cls.Settings, state, "image processor"))

    def scale(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, (3, 1, 1) each, with which pixels in [0, 1] are normalised."""
        return torch.tensor(self.settings.mean)[:, None, None], torch.tensor(self.settings.std)[:, None, None]

    def with_augment(self, augment: Augment) -> ImageProcessor:
        """Return the same processor with another augmentation."""
        return ImageProcessor(msgspec.structs.replace(self.settings, augment=augment))

    def _augmented(self, image: Image.Image, recipe: Recipe, draw: Draw) -> Tensor:
        height, width = self.settings.image_size
        box = vary_box(self._crop_box(*image.size), recipe, draw)
        red, green, blue = (round(255 * value) for value in self.settings.mean)
        resample = Image.Resampling[self.settings.interpolation.upper()]
        image = cut(image, box, (width, height), resample, (red, green, blue))
        pixels: Tensor = pil_to_tensor(image)
        if draw.chance(recipe.flip):
            pixels = pixels.flip(-1)
        if not recipe.colour and not recipe.erase:
            return pixels
        pixels = vary_colour(pixels.float() / 255, recipe.colour, draw)
        if draw.chance(recipe.erase):
            pixels = erase(pixels, self.settings.mean, draw)
        mean, std = self.scale()
        return (pixels - mean) / std

    def _crop_box(self, width: int, height: int) -> Box:
        """Return the part of the picture that the evaluation transform shows, in pixels of the picture."""
        (rows, columns), pct = self.settings.image_size, self.settings.crop_pct
        tall, wide = math.floor(rows / pct), math.floor(columns / pct)  # what is resized to, before the crop
        ratios = (width / wide, height / tall)
        if self.settings.crop_mode == "squash":
            w, h = columns * ratios[0], rows * ratios[1]
        else:
            pixel = (max if self.settings.crop_mode == "border" else min)(ratios)
            w, h = columns * pixel, rows * pixel
        return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2

    def _check_shape(self, image: Image.Image, policy: Policy, raw: Any) -> None:
        """Refuse strips: scaling the short side up to the crop would blow the long side up beyond all bounds."""
        if self.settings.crop_mode != "center":
            return
        short = math.ceil(max(self.settings.image_size) / self.settings.crop_pct)
        if short**2 * max(image.size) / min(image.size) > policy.max_pixels:
            size = f"{image.width}x{image.height}"
            raise InputError(f"{describe_raw(raw)} is too narrow ({size} pixels)", "crop it first")
