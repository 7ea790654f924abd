"""A Conformer over subsampled log-mel frames, trained from scratch. Gulati et al. 2020 (arXiv:2005.08100).

torchaudio's `models.Conformer` is not used: it masks its attention alone, so its depthwise convolution reads the
padding that the layers before have filled, and a clip's output changes with the batch it is in. Here every
convolution reads masked input, and LayerNorm stands in for BatchNorm, whose statistics padding would enter.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.batch import Features
from mmhub.layers import Attention, attention_mask
from mmhub_audio.scratch import ScratchConfig, ScratchEncoder, Subsample, finish
from mmhub_audio.transformer import add_positions, check_heads


class Conformer(ScratchEncoder):
    """Half feed-forward, attention, convolution, half feed-forward: one token for every four frames (40 ms)."""

    class Config(ScratchConfig, frozen=True):
        dim: int = 144
        depth: int = 4
        heads: int = 4
        mlp_ratio: float = 4.0
        kernel: int = 15  # tokens the depthwise convolution sees, odd
        channels: int = 32  # of the subsampling convolutions
        dropout: float = 0.1

        def __post_init__(self) -> None:
            super().__post_init__()
            check_heads(self.dim, self.heads)
            if self.kernel < 1 or self.kernel % 2 == 0:
                raise ValueError(f"kernel must be odd, not {self.kernel}")

    def __init__(self, config: Any, processor: Any) -> None:
        super().__init__(config, processor)
        self.subsample = Subsample(config.bands, config.channels, config.dim)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.depth))

    def encode(self, frames: Tensor, mask: Tensor) -> Features:
        x, mask = self.subsample(frames, mask)
        x = self.drop(add_positions(x))
        attend = attention_mask(mask)
        for block in self.blocks:
            x = block(x, mask, attend)
        return finish(x, mask)


class ConformerBlock(nn.Module):
    """One Conformer block over (N, T, D), figure 1 of the paper."""

    def __init__(self, config: Conformer.Config) -> None:
        super().__init__()
        dim = config.dim
        self.before, self.after = (_feed_forward(dim, config.mlp_ratio, config.dropout) for _ in range(2))
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, config.heads, config.dropout)
        self.convolution = ConvolutionModule(dim, config.kernel)
        self.drop = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor, attend: Tensor) -> Tensor:
        x = x + 0.5 * self.before(x)
        x = x + self.drop(self.attention(self.attention_norm(x), attend))
        x = x + self.drop(self.convolution(x, mask))
        x = x + 0.5 * self.after(x)
        normed: Tensor = self.norm(x)
        return normed


class ConvolutionModule(nn.Module):
    """Gated pointwise, depthwise, pointwise convolution over time: (N, T, D) -> (N, T, D), figure 2 of the paper."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.inner_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = F.glu(self.gate(self.norm(x)), dim=-1) * mask.unsqueeze(-1).to(x.dtype)
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        projected: Tensor = self.out(F.silu(self.inner_norm(x)))
        return projected


def _feed_forward(dim: int, ratio: float, dropout: float) -> nn.Sequential:
    hidden = int(dim * ratio)
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim), nn.Dropout(dropout)
    )
