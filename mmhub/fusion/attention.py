"""Let the tokens of all modalities attend to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn

from mmhub.batch import Bundle, Features
from mmhub.errors import UsageError
from mmhub.interfaces import ComponentConfig, Fusion, Rate, Stream, Width
from mmhub.layers import TransformerEncoder, keep_modalities, masked_mean


class Attention(Fusion):
    """A Transformer over a learned query token, then each modality's summary and tokens.

    A missing modality is one learned stand-in token. The query keeps one position valid in every row, and its output
    is the row's summary: `fused` holds all positions (B, 1 + T', D) with `pooled` (B, D).
    """

    class Config(ComponentConfig):
        """`dim` must be a multiple of `heads`; `tokens = false` lets only the summaries take part (faster)."""

        dim: Width = 128
        depth: Annotated[int, msgspec.Meta(ge=0)] = 2
        heads: Width = 4
        dropout: Rate = 0.1
        modality_dropout: Rate = 0.3
        tokens: bool = True

        def __post_init__(self) -> None:
            if self.dim % self.heads:
                raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        if not inputs:
            raise UsageError("attention fusion needs at least one encoder")
        dim = config.dim
        self.token_norms = nn.ModuleDict({name: nn.LayerNorm(s.dim) for name, s in inputs.items()})
        self.token_projections = nn.ModuleDict({name: nn.Linear(s.dim, dim) for name, s in inputs.items()})
        pooled = {name: s.pooled for name, s in inputs.items() if s.pooled}
        self.pooled_norms = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in pooled.items()})
        self.pooled_projections = nn.ModuleDict({name: nn.Linear(width, dim) for name, width in pooled.items()})
        idle = () if config.tokens else pooled  # kept for older checkpoints; what never learns must not seem to
        for name in idle:
            self.token_norms[name].requires_grad_(False)
            self.token_projections[name].requires_grad_(False)
        self.kinds = nn.ParameterDict({name: _vector(dim) for name in inputs})
        self.stand_ins = nn.ParameterDict({name: _vector(dim) for name in inputs})
        self.query = _vector(dim)
        self.encoder = TransformerEncoder(dim, config.depth, config.heads, dropout=config.dropout)
        self.outputs = {"fused": Stream(dim, pooled=dim)}
        # without a summary of its own a modality's tokens are projected, and averaged only then
        self.reads = "summary" if not config.tokens and len(pooled) == len(inputs) else "tokens"

    def forward(self, bundle: Bundle, plan: Any = None, embed: Any = None) -> Bundle:
        present = torch.stack([bundle[name].present for name in self.inputs], dim=1)
        if self.training and self.config.modality_dropout and len(self.inputs) > 1:
            present = keep_modalities(present, self.config.modality_dropout)
        batch = present.shape[0]
        tokens = [self.query.expand(batch, 1, -1)]
        masks = [present.new_ones(batch, 1)]
        for i, name in enumerate(self.inputs):
            part, mask = self._modality(name, bundle[name], present[:, i])
            tokens.append(part)
            masks.append(mask)
        x, mask = torch.cat([t.to(tokens[-1].dtype) for t in tokens], dim=1), torch.cat(masks, dim=1)
        x = self.encoder(x, mask)
        return bundle | {"fused": Features(*_right_padded(x, mask), pooled=x[:, 0])}

    def _modality(self, name: str, features: Features, present: Tensor) -> tuple[Tensor, Tensor]:
        """One modality's summary-or-stand-in token (always valid) followed by its tokens."""
        real = features.mask & present[:, None]
        pooled = name in self.pooled_projections
        if self.config.tokens or not pooled:
            projected = self.token_projections[name](self.token_norms[name](features.tokens))
        if pooled:
            head = self.pooled_projections[name](self.pooled_norms[name](features.pooled))
        else:
            head = masked_mean(projected, real)
        head = torch.where(present[:, None], head, self.stand_ins[name].to(head.dtype))[:, None]
        first = present.new_ones(present.shape[0], 1)
        if not self.config.tokens:
            return head + self.kinds[name], first
        part = torch.cat([head, projected * real.unsqueeze(-1).to(projected.dtype)], dim=1)
        return part + self.kinds[name], torch.cat([first, real], dim=1)


def _right_padded(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of each modality, which stands between their tokens, behind them all."""
    order = mask.long().argsort(dim=1, descending=True, stable=True)
    return x.gather(1, order[..., None].expand_as(x)), mask.gather(1, order)


def _vector(dim: int) -> nn.Parameter:
    vector = nn.Parameter(torch.empty(dim))
    nn.init.normal_(vector, std=0.02)
    return vector
