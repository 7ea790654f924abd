"""Raw image inputs to 8-bit RGB pictures, decoded here or, as the policy says, in another process.

Resizing is left to the processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from mmhub.errors import InputError
from mmhub.interfaces import Policy, describe_raw, raw_bytes
from mmhub.interfaces.apart import decode_apart
from mmhub.interfaces.raw import worker_of
from mmhub_image.encoded import ACCEPTED, decode_picture, picture_pixels, to_upright


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
        return _from_bytes(content, name, policy, raw)
    if isinstance(raw, Image.Image):
        return to_upright(raw, name, policy)
    if isinstance(raw, (np.ndarray, torch.Tensor)):
        return to_upright(_from_array(raw, name), name, policy)
    raise InputError(f"{name} is not an image", ACCEPTED)


def _from_bytes(content: bytes, name: str, policy: Policy, raw: Any) -> Image.Image:
    bounds = worker_of(raw, policy)
    if bounds is None:
        try:
            return decode_picture(content, name, policy)
        except MemoryError:
            raise InputError(f"{name} does not fit into memory", "make it smaller") from None
    found = list(decode_apart(picture_pixels, content, name, policy, bounds))
    pixels = found[-1] if found else None
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise InputError(f"{name} could not be decoded: its decoder answered nonsense", "it may be made to harm")
    return Image.fromarray(pixels)


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
