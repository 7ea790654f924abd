"""InceptionTime (Ismail Fawaz et al. 2020, arXiv:1909.04939): one network of the ensemble, without its last layer."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.batch import Features
from mmhub_timeseries.encoder import SeriesConfig, SeriesEncoder
from mmhub_timeseries.processor import Count

_EVERY = 3  # blocks that a residual connection spans


class InceptionTime(SeriesEncoder):
    """A stack of inception blocks with a residual connection over every third: one token a step, (N, S, 4 F).

    A convolution reads zeros beyond the end of a series, as it would at the end of the tensor, and batch statistics
    are those of real steps alone, so that padding changes nothing.
    """

    class Config(SeriesConfig, frozen=True):
        """The defaults are the paper's; a token has four times `filters` numbers."""

        depth: Count = 6  # blocks
        filters: Count = 32  # of each of a block's four branches
        bottleneck: Count = 32  # channels that the convolutions read
        kernel_size: Annotated[int, msgspec.Meta(ge=4)] = 40  # steps of the longest; the others have a half, a quarter
        dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0

    def __init__(self, config: Config, processor: Any) -> None:
        super().__init__(config, processor)
        self.dim = 4 * config.filters
        channels = 2 * processor.channels
        widths = [channels, *[self.dim] * (config.depth - 1)]
        self.blocks = nn.ModuleList(
            Block(width, config.filters, config.bottleneck, config.kernel_size) for width in widths
        )
        starts = [channels, *[self.dim] * (config.depth // _EVERY - 1)]
        self.shortcuts = nn.ModuleList(Shortcut(start, self.dim) for start in starts[: config.depth // _EVERY])
        self.drop = nn.Dropout(config.dropout)

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        keep = mask[:, None]
        x = start = data.to(next(self.parameters()).dtype).transpose(1, 2).masked_fill(~keep, 0)
        for i, block in enumerate(self.blocks):
            x = block(x, keep)
            if i % _EVERY == _EVERY - 1:
                x = start = torch.relu(x + self.shortcuts[i // _EVERY](start, keep))
        return Features(tokens=self.drop(x).transpose(1, 2), mask=mask)


class Block(nn.Module):
    """Three convolutions and a maximum side by side: (N, C, S) -> (N, 4 F, S), zero where masked."""

    def __init__(self, channels: int, filters: int, bottleneck: int, kernel_size: int) -> None:
        super().__init__()
        self.bottleneck = nn.Conv1d(channels, bottleneck, 1, bias=False)
        self.sizes = [kernel_size // 2**i for i in range(3)]
        self.convolutions = nn.ModuleList(nn.Conv1d(bottleneck, filters, size, bias=False) for size in self.sizes)
        self.after_maximum = nn.Conv1d(channels, filters, 1, bias=False)
        self.norm = MaskedBatchNorm(4 * filters)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        narrow = self.bottleneck(x)
        parts = [conv(F.pad(narrow, _same(size))) for conv, size in zip(self.convolutions, self.sizes, strict=True)]
        lowest = x.masked_fill(~keep, torch.finfo(x.dtype).min)  # padding must not win over negative values
        parts.append(self.after_maximum(F.max_pool1d(lowest, 3, stride=1, padding=1) * keep))
        return torch.relu(self.norm(torch.cat(parts, dim=1), keep))


def _same(size: int) -> tuple[int, int]:
    """The zeros before and after that keep the length under a kernel of `size`."""
    return (size - 1) // 2, size // 2


class Shortcut(nn.Module):
    """A pointwise convolution with a norm, so that widths agree: (N, C, S) -> (N, D, S)."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, dim, 1, bias=False)
        self.norm = MaskedBatchNorm(dim)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.conv(x), keep)
        return normed


class MaskedBatchNorm(nn.Module):
    """Batch normalisation of (N, C, S) over the real steps alone; masked ones come out zero."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # 16-bit sums over many steps are too coarse
            wide, real = x.float(), keep.float()
            mean, var = self._of_batch(wide, real) if self.training else (self.running_mean, self.running_var)
            scale = self.weight.float() * torch.rsqrt(var.float() + self.eps)
            normed = (wide - mean.float()[:, None]) * scale[:, None] + self.bias.float()[:, None]
            return (normed * real).to(x.dtype)

    def _of_batch(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        count = real.sum().clamp(min=1)
        mean = (x * real).sum((0, 2)) / count
        var = ((x - mean[:, None]).square() * real).sum((0, 2)) / count
        with torch.no_grad():
            unbiased = var * count / (count - 1).clamp(min=1)  # as torch.nn.BatchNorm1d keeps it
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, var
