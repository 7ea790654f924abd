"""Weigh the modalities of each row by learned gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mmhub.batch import Bundle, Features
from mmhub.fusion.missing import Summaries
from mmhub.interfaces import ComponentConfig, Fusion, Rate, Stream, Width


class Gated(Fusion):
    """Gated multimodal units (Arevalo et al., arXiv:1702.01992) for any number of modalities.

    The fused token (B, 1, D) is a convex combination of the modalities that are there; a missing one has weight zero
    and, unlike in `concat` and `attention`, its stand-in only informs the gates.
    """

    class Config(ComponentConfig):
        """`dim` is the width of each projection and of the result."""

        dim: Width = 128
        dropout: Rate = 0.1
        modality_dropout: Rate = 0.3

    reads = "summary"

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        self.summaries = Summaries(inputs, config.dim, config.modality_dropout)
        self.gate = nn.Linear(config.dim * len(inputs), len(inputs))
        self.drop = nn.Dropout(config.dropout)
        self.outputs = {"fused": Stream(config.dim)}

    def forward(self, bundle: Bundle, plan: Any = None, embed: Any = None) -> Bundle:
        vectors, present = self.summaries(bundle)
        open_to = present | ~present.any(1, keepdim=True)  # a row with nothing at all mixes the stand-ins
        scores = self.gate(vectors.flatten(1)).masked_fill(~open_to, -torch.inf)
        mixed = (scores.softmax(1)[..., None] * torch.tanh(vectors)).sum(1, keepdim=True)
        fused = self.drop(mixed)
        return bundle | {"fused": Features(fused, torch.ones_like(fused[..., 0], dtype=torch.bool))}
