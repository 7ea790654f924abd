"""Raw image inputs to 8-bit RGB pictures, with bounds checked on the header. Resizing is left to the processor."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from mmhub.errors import InputError
from mmhub.interfaces import Policy, describe_raw, raw_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

_ACCEPTED = f"give {', '.join(FORMATS)} as a path or bytes, a PIL image, or a uint8 array"


def open_image(raw: Any, policy: Policy) -> Image.Image:
    """Return `raw` as an upright 8-bit RGB picture; transparent parts lie on white.

    `raw` is what `mmhub.interfaces.raw_bytes` accepts, a PIL image, a uint8 array (H, W, 3) or (H, W), or a uint8
    tensor (3, H, W).

    Raises:
        InputError: not an image, damaged, animated, or more than `policy.max_pixels`.
    """
    name = describe_raw(raw)
    content = raw_bytes(raw, policy)
    if content is not None:
        image = _open_bytes(content, name)
    elif isinstance(raw, Image.Image):
        image = raw
    elif isinstance(raw, (np.ndarray, torch.Tensor)):
        image = _from_array(raw, name)
    else:
        raise InputError(f"{name} is not an image", _ACCEPTED)
    _check_bounds(image, policy, name)
    try:
        if content is not None:
            _check_whole(content, image.format)
        return _to_rgb(image, name)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly any exception on damaged data
        raise InputError(f"{name} is a damaged {image.format or 'image'}: {_reason(error)}") from None


def _open_bytes(content: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} has too many pixels: {_reason(error)}", "make it smaller") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{name} is not an image mmhub can read", _ACCEPTED) from None
    except Exception as error:  # as above: the header may be damaged too
        raise InputError(f"{name} is a damaged image: {_reason(error)}") from None


def _from_array(raw: np.ndarray[Any, Any] | torch.Tensor, name: str) -> Image.Image:
    """Build a picture from uint8 (H, W, 3) or (H, W) numpy, or (3, H, W) torch."""
    hint = "an array is uint8 (H, W, 3) or (H, W), a tensor is uint8 (3, H, W)"
    if isinstance(raw, torch.Tensor):
        fits = raw.dtype == torch.uint8 and raw.ndim == 3 and raw.shape[0] == 3
        array = raw.detach().cpu().permute(1, 2, 0).numpy() if fits else None
    else:
        fits = raw.dtype == np.uint8 and (raw.ndim == 2 or (raw.ndim == 3 and raw.shape[2] == 3))
        array = raw if fits else None
    if array is None or not array.size:
        raise InputError(f"{name} of {raw.dtype} and shape {tuple(raw.shape)} is not an image", hint)
    return Image.fromarray(np.ascontiguousarray(array))


def _check_bounds(image: Image.Image, policy: Policy, name: str) -> None:
    """Refuse by the header alone: nothing is decoded before this."""
    width, height = image.size
    if width * height > policy.max_pixels:
        size = f"{width}x{height} = {width * height} pixels"
        raise InputError(f"{name} has {size}, more than the limit of {policy.max_pixels}", "make it smaller")
    if not width * height:
        raise InputError(f"{name} has no pixels")


def _check_whole(content: bytes, kind: str | None) -> None:
    """Raise for damage that Pillow's decoders pass over: a wrong checksum in a PNG, a JPEG that ends in other bytes.

    WebP, BMP, PPM and the pixels of a JPEG hold no checksums: there, other values are another picture.
    """
    if kind == "PNG":
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.verify()
    if kind not in ("JPEG", "MPO"):
        return
    place = 2
    while marker := _JPEG_MARKER.search(content, place):
        if marker[0] == b"\xff\xd9":
            return
        place = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2])
    raise SyntaxError("its end is missing")  # as Pillow does


_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # among pixels, the others are data, restarts and filling


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    # A phone's JPEG may carry a second picture (MPO, a depth map or preview): the first is the photograph.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        frames = getattr(image, "n_frames", "several")
        raise InputError(f"{name} is animated or has pages ({frames} frames)", "save one frame as a still image")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):
        image = _from_16_bit(image, name)
    if image.mode == "F":
        raise InputError(f"{name} has floating-point pixels of unknown range", "convert it to 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image, name: str) -> Image.Image:
    """Keep the high byte of 16-bit grey levels, which Pillow gives as "I;16" or as "I"; the clear level is white."""
    levels, clear = np.array(image), image.info.get("transparency")
    if levels.min() < 0 or levels.max() > 0xFFFF:
        raise InputError(f"{name} has 32-bit pixels of unknown range", "convert it to 8 bits a channel")
    if isinstance(clear, int):
        levels[levels == clear] = 0xFFFF  # on white
    return Image.fromarray((levels.astype(np.uint16) >> 8).astype(np.uint8))


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
