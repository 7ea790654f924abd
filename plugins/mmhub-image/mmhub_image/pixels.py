"""Pictures to pixels as the image processors of transformers do it, with the settings of a model's own folder.

Pixels stay uint8, a quarter of the bytes that workers hand over and a GPU is sent; the encoder normalises them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mmhub.errors import InputError, PluginError, TrustError, UsageError
from mmhub.interfaces import Policy, Processor, describe_raw
from mmhub_image.decode import open_image
from mmhub_image.library import library, quiet, reason

# Those that make one picture of one size of every picture, or can be told to.
KINDS = (
    *("BitImageProcessor", "CLIPImageProcessor", "GotOcr2ImageProcessor", "Idefics3ImageProcessor"),
    *("LlavaImageProcessor", "SiglipImageProcessor", "SmolVLMImageProcessor", "ViTImageProcessor"),
)
# A picture is one item here: what cuts it into several tiles is switched off.
_WHOLE = {"do_image_splitting": False, "crop_to_patches": False}
MAX_SIDE = 4096  # pixels of a side: a model's folder may not ask for more memory than pictures may
_SIDES = {"height", "width", "shortest_edge", "longest_edge"}
_RAW = {"do_rescale": False, "do_normalize": False}


class VisionProcessor(Processor):
    """Resize and crop pictures to uint8 (3, H, W) as a transformers image processor `kind` does with its `settings`."""

    modality = "image"
    fixed_length = True

    def __init__(self, kind: str, settings: Mapping[str, Any]) -> None:
        if kind not in KINDS:
            raise UsageError(f"the image processor {kind!r} of transformers is not used here", _known())
        known = _checked(settings)
        self.kind, self.settings = kind, known | {key: value for key, value in _WHOLE.items() if key in known}
        try:
            with quiet():
                self._library: Any = getattr(library(), kind)(**self.settings)
        except PluginError:
            raise
        except Exception as error:  # whatever the library makes of settings that do not fit each other
            raise TrustError(f"{kind} does not accept these settings: {reason(error)}") from None

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """Read preprocessor_config.json, or the part of processor_config.json that newer folders have instead.

        Raises:
            TrustError: there is neither, or it is damaged. UsageError: it names a processor that is not used here.
        """
        try:
            with quiet():
                found = library().AutoImageProcessor.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # whatever the library makes of damaged files
            raise TrustError(f"'{folder}' does not say how pictures are prepared: {reason(error)}") from None
        kind = type(found).__name__.removesuffix("Fast").removesuffix("Pil")
        return cls(kind, _plain(found.to_dict()))

    @classmethod
    def of_size(cls, size: int) -> Self:
        """Make pictures squares of `size` pixels, with values from -1 to 1."""
        return cls("ViTImageProcessor", {"size": {"height": size, "width": size}, "resample": 3})

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        """Return pixels, uint8 (3, H, W)."""
        image = open_image(raw, policy)
        self._check_shape(image.size, policy, raw)
        pixels: Tensor = self._library(images=image, return_tensors="pt", **_RAW)["pixel_values"]
        return pixels.reshape(-1, *pixels.shape[-3:])[0].to(torch.uint8)

    def length(self, raw: Any, policy: Policy) -> int:
        """Return 1: a picture is one raw position."""
        return 1

    def pack(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Stack to (N, 3, H, W); a picture is one raw position, so the mask is (N, 1)."""
        sizes = {tuple(item.shape[1:]) for item in items}
        if len(sizes) > 1:
            what = " and ".join(f"{height}x{width}" for height, width in sorted(sizes)[:2])
            raise InputError(f"pictures become {what} pixels, and a batch holds one size", "give squares")
        return torch.stack(list(items)), torch.ones(len(items), 1, dtype=torch.bool)

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "settings": self.settings}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls(str(state["kind"]), state["settings"])

    def scale(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, (3, 1, 1) each, with which uint8 pixels are normalised."""
        found = self._library
        factor = found.rescale_factor if found.do_rescale else 1.0
        mean, std = (found.image_mean, found.image_std) if found.do_normalize else ((0.0,) * 3, (1.0,) * 3)
        return torch.tensor(mean)[:, None, None] / factor, torch.tensor(std)[:, None, None] / factor

    def _check_shape(self, size: tuple[int, int], policy: Policy, raw: Any) -> None:
        """Refuse strips: scaling the short side up would blow the long side up beyond all bounds."""
        short = (self.settings.get("size") or {}).get("shortest_edge")
        if short and short**2 * max(size) / min(size) > policy.max_pixels:
            what = f"{size[0]}x{size[1]} pixels"
            raise InputError(f"{describe_raw(raw)} is too narrow ({what})", "crop it first")


def _checked(settings: Any) -> dict[str, Any]:
    """The settings that are used here, of whatever a stranger's file has under their names.

    Raises:
        TrustError: one is not possible, or would make pictures that fill the memory.
    """
    if not isinstance(settings, Mapping):
        raise TrustError(f"the settings of an image processor are a table, not {str(settings)[:80]!r}")
    known = {key: value for key, value in settings.items() if key in _SETTINGS and value is not None}
    for key, value in known.items():
        if not _SETTINGS[key](value):
            what = f"no image processor has {key} = {str(value)[:80]}"
            raise TrustError(what, f"sides go from 1 to {MAX_SIDE} pixels; the model may be damaged")
    return known


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        key in _SIDES and type(side) is int and 1 <= side <= MAX_SIDE for key, side in value.items()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_three(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_number, value))


_SETTINGS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("do_resize", "do_center_crop", "do_pad", "do_convert_rgb", "do_rescale", "do_normalize"), _is_switch
    ),
    **dict.fromkeys((*_WHOLE, "default_to_square"), _is_switch),
    **dict.fromkeys(("size", "crop_size", "pad_size", "max_image_size"), _is_size),
    "resample": lambda value: type(value) is int and 0 <= value <= 5,
    "rescale_factor": lambda value: _is_number(value) and value > 0,
    "image_mean": _are_three,
    "image_std": lambda value: _are_three(value) and min(value) > 0,
}


def _known() -> str:
    return f"there are {', '.join(kind.removesuffix('ImageProcessor') for kind in KINDS)}"


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items() if one is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value
