"""A convolutional network over log-mel frames, trained from scratch: small and quick on a CPU."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.batch import Features
from mmhub_audio.scratch import ScratchConfig, ScratchEncoder, finish


class CNN(ScratchEncoder):
    """Residual stages that halve the bands each time and the frames in the first two: one token for four frames.

    Normalisation is LayerNorm over the channels of each position, as in ConvNeXt (Liu et al. 2022, arXiv:2201.03545):
    batch statistics would let padding and other clips in.
    """

    class Config(ScratchConfig, frozen=True):
        dim: int = 128
        channels: tuple[int, ...] = (16, 32, 48, 64)  # one stage each
        dropout: float = 0.1

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.channels or min(self.channels) < 1 or self.dim < 1:
                raise ValueError("channels must list at least one stage of at least one channel, and dim be positive")

    def __init__(self, config: Any, processor: Any) -> None:
        super().__init__(config, processor)
        inputs = (1, *config.channels[:-1])
        strides = [2 if stage < 2 else 1 for stage in range(len(config.channels))]
        self.stride = 2 ** strides.count(2)
        self.token_seconds = self.stride * self.frontend.hop / config.sample_rate
        self.stages = nn.ModuleList(map(Stage, inputs, config.channels, strides))
        bands = -(-config.bands // 2 ** len(config.channels))
        self.drop = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.channels[-1] * bands, config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def encode(self, frames: Tensor, mask: Tensor) -> Features:
        x = frames.unsqueeze(1)
        for stage in self.stages:
            x, mask = stage(x, mask)
        x = self.out(self.drop(x.transpose(1, 2).flatten(2)))
        return finish(self.norm(x), mask)


class Stage(nn.Module):
    """A strided convolution and a residual one: (N, C, T, M) -> (N, C', ceil(T / stride), ceil(M / 2)), masked."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.down = nn.Conv2d(inputs, outputs, 3, stride=(stride, 2), padding=1)
        self.down_norm = ChannelNorm(outputs)
        self.conv = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_norm = ChannelNorm(outputs)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = mask[:, :: self.stride]
        keep = mask[:, None, :, None].to(x.dtype)
        x = F.gelu(self.down_norm(self.down(x))) * keep
        x = x + F.gelu(self.conv_norm(self.conv(x)))
        return x * keep, mask


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (N, C, T, M)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return normed
