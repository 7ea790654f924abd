"""Rotary positions (Su et al., arXiv:2104.09864): queries and keys turn with their place in the text."""

from __future__ import annotations

import torch
from torch import Tensor

Turn = tuple[Tensor, Tensor]  # cosine and sine, (..., 1, width of a head / 2) each


def turns(places: Tensor, width: int, theta: float, dtype: torch.dtype) -> Turn:
    """Return the turns of places (...) long, for heads that are `width` wide; computed in fp32."""
    rates = theta ** -(torch.arange(0, width, 2, device=places.device, dtype=torch.float32) / width)
    angles = places[..., None, None].float() * rates
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Turn (..., heads, width): the first half of the width pairs with the second."""
    (cos, sin), (a, b) = turn, x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
