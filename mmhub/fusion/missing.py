"""What mixing fusions share: one summary vector per modality, with a learned stand-in where a row lacks it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmhub.batch import Bundle
from mmhub.interfaces import Stream
from mmhub.layers import keep_modalities, summary


class Summaries(nn.Module):
    """Project each modality's summary to a common width; where a row lacks it, a learned vector stands in.

    forward: bundle -> (B, M, D) vectors and (B, M) bool of what is really there.
    """

    def __init__(self, inputs: Mapping[str, Stream], dim: int, modality_dropout: float) -> None:
        super().__init__()
        self.names = list(inputs)
        self.modality_dropout = modality_dropout
        self.norms = nn.ModuleDict({name: nn.LayerNorm(stream.summary) for name, stream in inputs.items()})
        self.projections = nn.ModuleDict({name: nn.Linear(stream.summary, dim) for name, stream in inputs.items()})
        self.stand_ins = nn.ParameterDict({name: nn.Parameter(torch.empty(dim)) for name in inputs})
        for stand_in in self.stand_ins.values():
            nn.init.normal_(stand_in, std=0.02)

    def forward(self, bundle: Bundle) -> tuple[Tensor, Tensor]:
        present = torch.stack([bundle[name].present for name in self.names], dim=1)
        if self.training and self.modality_dropout and len(self.names) > 1:
            present = keep_modalities(present, self.modality_dropout)
        vectors = []
        for i, name in enumerate(self.names):
            vector = self.projections[name](self.norms[name](summary(bundle[name])))
            vectors.append(torch.where(present[:, i, None], vector, self.stand_ins[name].to(vector.dtype)))
        return torch.stack(vectors, dim=1), present
