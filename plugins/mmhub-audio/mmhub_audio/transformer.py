"""A Transformer over subsampled log-mel frames, trained from scratch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmhub.batch import Features
from mmhub.layers import TransformerEncoder, sinusoidal_positions
from mmhub_audio.scratch import ScratchConfig, ScratchEncoder, Subsample


class Transformer(ScratchEncoder):
    """Pre-norm Transformer with fixed positions, one token for every four frames (40 ms by default)."""

    class Config(ScratchConfig, frozen=True):
        dim: int = 144
        depth: int = 4
        heads: int = 4
        mlp_ratio: float = 4.0
        channels: int = 32  # of the subsampling convolutions
        dropout: float = 0.1

        def __post_init__(self) -> None:
            super().__post_init__()
            check_heads(self.dim, self.heads)

    def __init__(self, config: Any, processor: Any) -> None:
        super().__init__(config, processor)
        self.subsample = Subsample(config.bands, config.channels, config.dim)
        self.drop = nn.Dropout(config.dropout)
        self.encoder = TransformerEncoder(config.dim, config.depth, config.heads, config.mlp_ratio, config.dropout)

    def encode(self, frames: Tensor, mask: Tensor) -> Features:
        x, mask = self.subsample(frames, mask)
        x = self.drop(add_positions(x))
        return Features(tokens=self.encoder(x, mask), mask=mask)


def add_positions(x: Tensor) -> Tensor:
    """Add sinusoidal positions to (N, T, D) tokens."""
    with torch.no_grad():
        positions = sinusoidal_positions(x.shape[1], x.shape[2], x.device)
    return x + positions.to(x.dtype)


def check_heads(dim: int, heads: int) -> None:
    """Raise ValueError unless `dim` splits evenly over `heads`."""
    if heads < 1 or dim < 1 or dim % heads:
        raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
