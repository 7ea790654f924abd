"""Pictures to normalised pixels: timm's evaluation transform, and augmentation in training."""

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
from mmhub_image.augment import RECIPES, Augment, Box, Draw, cut, erase, vary_box, vary_colour
from mmhub_image.decode import open_image


class ImageProcessor(Processor):
    """Decode, resize, crop and normalise pictures to float32 (3, H, W), as timm does for evaluation.

    In training, `augment` varies them (see `mmhub_image.augment`), a pure function of picture and seed.
    """

    modality = "image"

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
        self._mean = torch.tensor(settings.mean)[:, None, None]
        self._std = torch.tensor(settings.std)[:, None, None]
        self._evaluate = create_transform(
            input_size=(3, *settings.image_size),
            is_training=False,
            interpolation=settings.interpolation,
            mean=settings.mean,
            std=settings.std,
            crop_pct=settings.crop_pct,
            crop_mode=settings.crop_mode,
            normalize=False,  # stops at uint8: normalising is ours, and may move to the GPU
        )

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        """Return normalised pixels, float32 (3, H, W)."""
        image = open_image(raw, policy)
        if rng is None or not self.augments:
            self._check_shape(image, policy, raw)
            return self._normalise(self._evaluate(image).float() / 255)
        return self._normalise(self._augmented(image, Draw(rng)))

    def pack(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Stack to (N, 3, H, W); a picture is one raw position, so the mask is (N, 1)."""
        return torch.stack(list(items)), torch.ones(len(items), 1, dtype=torch.bool)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self.settings))
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls(decode_config(cls.Settings, state, "image processor"))

    def with_augment(self, augment: Augment) -> ImageProcessor:
        """Return the same processor with another augmentation."""
        return ImageProcessor(msgspec.structs.replace(self.settings, augment=augment))

    def _normalise(self, pixels: Tensor) -> Tensor:
        return (pixels - self._mean) / self._std

    def _augmented(self, image: Image.Image, draw: Draw) -> Tensor:
        """Return a varied picture as (3, H, W) in [0, 1]."""
        recipe, (height, width) = RECIPES[self.settings.augment], self.settings.image_size
        box = vary_box(self._crop_box(*image.size), recipe, draw)
        red, green, blue = (round(255 * value) for value in self.settings.mean)
        resample = Image.Resampling[self.settings.interpolation.upper()]
        image = cut(image, box, (width, height), resample, (red, green, blue))
        pixels = pil_to_tensor(image).float() / 255
        if draw.chance(recipe.flip):
            pixels = pixels.flip(-1)
        if recipe.colour:
            pixels = vary_colour(pixels, recipe.colour, draw)
        return erase(pixels, self.settings.mean, draw) if draw.chance(recipe.erase) else pixels

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
