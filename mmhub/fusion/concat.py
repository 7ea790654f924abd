"""Concatenate one summary vector per modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mmhub.batch import Bundle, Features
from mmhub.fusion.missing import Summaries
from mmhub.interfaces import ComponentConfig, Fusion, Rate, Stream, Width


class Concat(Fusion):
    """Late fusion: project each summary to `dim`, join them, mix with one hidden layer -> one fused token (B, 1, D)."""

    class Config(ComponentConfig):
        """`dim` is the width of each projection and of the result."""

        dim: Width = 128
        dropout: Rate = 0.1
        modality_dropout: Rate = 0.3

    reads = "summary"

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        self.summaries = Summaries(inputs, config.dim, config.modality_dropout)
        self.mix = nn.Sequential(nn.Linear(config.dim * len(inputs), config.dim), nn.GELU(), nn.Dropout(config.dropout))
        self.outputs = {"fused": Stream(config.dim)}

    def forward(self, bundle: Bundle, plan: Any = None, embed: Any = None) -> Bundle:
        vectors, _ = self.summaries(bundle)
        fused = self.mix(vectors.flatten(1))[:, None]
        return bundle | {"fused": Features(fused, torch.ones_like(fused[..., 0], dtype=torch.bool))}
