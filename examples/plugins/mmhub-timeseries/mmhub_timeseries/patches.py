"""A Transformer over patches, in the way of PatchTST (Nie et al. 2023, arXiv:2211.14730), all channels in one token."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.batch import Features
from mmhub.layers import TransformerEncoder, sinusoidal_positions
from mmhub_timeseries.encoder import SeriesConfig, SeriesEncoder
from mmhub_timeseries.processor import Count


class PatchTransformer(SeriesEncoder):
    """Cut a series into patches of equal length and let them attend to each other: (N, ceil(S / patch), D)."""

    class Config(SeriesConfig, frozen=True):
        """`dim` must be a multiple of `heads`."""

        dim: Count = 64
        depth: Count = 2
        heads: Count = 4
        patch: Count = 8  # steps
        dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1

        def __post_init__(self) -> None:
            if self.dim % self.heads:
                raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")

    def __init__(self, config: Config, processor: Any) -> None:
        super().__init__(config, processor)
        self.dim = config.dim
        self.project = nn.Linear(config.patch * (2 * processor.channels + 1), config.dim)
        self.encoder = TransformerEncoder(config.dim, config.depth, config.heads, dropout=config.dropout)

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        real = mask[..., None]  # also as input: tells a patch that ends early from one that ends with zeros
        steps = torch.cat([data.masked_fill(~real, 0), real.to(data.dtype)], dim=2).to(next(self.parameters()).dtype)
        fill = -steps.shape[1] % self.config.patch
        patches = F.pad(steps, (0, 0, 0, fill)).unflatten(1, (-1, self.config.patch)).flatten(2)
        mask = F.pad(mask, (0, fill)).unflatten(1, (-1, self.config.patch)).any(2)
        x = self.project(patches)
        x = x + sinusoidal_positions(x.shape[1], self.dim, x.device).to(x.dtype)
        return Features(tokens=self.encoder(x, mask), mask=mask)
