"""What a decoder that writes reads: the tokens of several streams behind each other, as one source."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmhub.batch import Bundle
from mmhub.interfaces import Stream


class Joined(nn.Module):
    """Bring streams to one width and line up their tokens.

    Each stream is projected and normalised, so that none is louder than another; the bias of its norm is the mark by
    which its tokens are known.
    """

    def __init__(self, streams: Mapping[str, Stream], dim: int) -> None:
        super().__init__()
        self.streams = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(stream.dim, dim, bias=False), nn.LayerNorm(dim))
                for name, stream in streams.items()
            }
        )

    def forward(self, bundle: Bundle) -> tuple[Tensor, Tensor]:
        """Return tokens (B, T, D), T the sum of the streams' lengths, zero where masked, and their mask (B, T)."""
        mask = torch.cat([bundle[name].mask for name in self.streams], 1)
        tokens = torch.cat([project(bundle[name].tokens) for name, project in self.streams.items()], 1)
        return tokens * mask[..., None].to(tokens.dtype), mask
