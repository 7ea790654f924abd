"""Encoded pictures to 8-bit RGB, with bounds checked on the header. Nothing here needs PyTorch: it may run alone."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mmhub.errors import InputError
from mmhub.interfaces.raw import Policy

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ACCEPTED = f"give {', '.join(FORMATS)} as a path or bytes, a PIL image, or a uint8 array"


def decode_picture(content: bytes, name: str, policy: Policy) -> Image.Image:
    """Return the picture that `content` holds, upright and on white.

    Raises:
        InputError: not an image, damaged, animated, or beyond a limit.
    """
    return to_upright(_open_bytes(content, name), name, policy, content)


def picture_pixels(content: bytes, name: str, policy: Policy) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the pixels of `decode_picture`, uint8 (H, W, 3)."""
    yield np.asarray(decode_picture(content, name, policy))


def to_upright(image: Image.Image, name: str, policy: Policy, content: bytes | None = None) -> Image.Image:
    """Decode an opened picture; `content` is the file that it is from.

    Raises:
        InputError: damaged, animated, or beyond a limit.
    """
    _check_bounds(image, policy, name)
    if content is not None:
        policy.check_ratio(3 * image.width * image.height, len(content), name)
    try:
        if content is not None:
            _check_whole(content, image.format)
        return _to_rgb(image, name)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly any exception on damaged data
        raise InputError(f"{name} is a damaged {image.format or 'image'}: {_reason(error)}") from None


def _open_bytes(content: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} has too many pixels: {_reason(error)}", "make it smaller") from None
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise InputError(f"{name} is not an image mmhub can read", ACCEPTED) from None
    except Exception as error:  # as above: the header may be damaged too
        raise InputError(f"{name} is a damaged image: {_reason(error)}") from None


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
        raise InputError(f"{name} is animated or has pages", "save one frame as a still image")
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
    text = _OBJECT.sub("data", str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__


_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")  # an address of this process is nobody's business
