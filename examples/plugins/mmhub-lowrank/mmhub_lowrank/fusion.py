"""Low-rank Multimodal Fusion (Liu et al. 2018, arXiv:1806.00064)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmhub.batch import Bundle, Features
from mmhub.errors import UsageError
from mmhub.interfaces import ComponentConfig, Fusion, Rate, Stream, Width
from mmhub.layers import keep_modalities, summary


class LowRank(Fusion):
    """Every product of numbers of different modalities, at a cost that grows with their number and not its power.

    Each summary is normalised, extended with a constant 1 (so that what one modality says alone counts, too) and
    multiplied with its own factors, R matrices (P + 1, D). The results of all modalities are multiplied element by
    element and summed over the ranks: one fused token (B, 1, D). Where a row lacks a modality, a learned vector stands
    in for its summary; `modality_dropout` makes rows lack one in training.
    """

    class Config(ComponentConfig, frozen=True):
        """`dim` is the width of the result; `rank` the number of products it is a sum of."""

        dim: Width = 128
        rank: Width = 4
        dropout: Rate = 0.1
        modality_dropout: Rate = 0.3

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        if not inputs:
            raise UsageError("lowrank fusion needs at least one encoder", "add [model.encoders.NAME]")
        widths = {name: stream.summary for name, stream in inputs.items()}
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in widths.items()})
        self.stand_ins = nn.ParameterDict({name: _normal((width,), 0.02) for name, width in widths.items()})
        self.factors = nn.ParameterDict(
            {name: _normal((config.rank, width + 1, config.dim), (width + 1) ** -0.5) for name, width in widths.items()}
        )
        self.weights = _normal((config.rank,), config.rank**-0.5)
        self.bias = nn.Parameter(torch.zeros(config.dim))
        self.drop = nn.Dropout(config.dropout)
        self.outputs = {"fused": Stream(config.dim)}

    def forward(self, bundle: Bundle, plan: Any = None, embed: Any = None) -> Bundle:
        present = torch.stack([bundle[name].present for name in self.inputs], dim=1)
        if self.training and self.config.modality_dropout:
            present = keep_modalities(present, self.config.modality_dropout)
        parts = [self._project(name, bundle[name], present[:, i, None]) for i, name in enumerate(self.inputs)]
        products = torch.stack(parts).prod(0)  # (B, R, D)
        fused = torch.einsum("brd,r->bd", products, self.weights.to(products.dtype)) + self.bias.to(products.dtype)
        return bundle | {"fused": Features(self.drop(fused)[:, None], torch.ones_like(present[:, :1]))}

    def _project(self, name: str, features: Features, present: Tensor) -> Tensor:
        """One modality's (B, R, D), of its summary where present and of its stand-in elsewhere."""
        vector = self.norms[name](summary(features))
        vector = torch.where(present, vector, self.stand_ins[name].to(vector.dtype))
        extended = torch.cat([vector, torch.ones_like(vector[:, :1])], dim=1)
        return torch.einsum("bp,rpd->brd", extended, self.factors[name].to(extended.dtype))


def _normal(shape: tuple[int, ...], std: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * std)
