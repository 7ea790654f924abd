"""A Transformer encoder stack that computes real positions only, its attention, and fixed positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.layers.packing import Packing, packed_attention


def sinusoidal_positions(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed sine and cosine positions, (T, D), as in Vaswani et al. 2017 (arXiv:1706.03762, section 3.5)."""
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    angle = position * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :dim]


def attention_mask(mask: Tensor) -> Tensor:
    """Turn a (B, T) mask into (B, 1, T, T) for SDPA; padded queries attend to themselves, or softmax yields NaN."""
    eye = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return mask[:, None, None, :] | eye


class Attention(nn.Module):
    """Multi-head self-attention over (B, T, D) with a (B, 1, T, T) bool mask, or over (tokens, D) with a `Packing`."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | Packing | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        drop = self.dropout if self.training else 0.0
        if isinstance(mask, Packing):
            q, k, v = qkv.unbind(1)
            y = packed_attention(q, k, v, mask, dropout=drop)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop).transpose(1, 2)
        return self.out(y.flatten(-2))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and a GELU feed-forward layer, over whatever `Attention` takes."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | Packing | None) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), mask))
        return x + self.drop(self.mlp(self.norm2(x)))


class TransformerEncoder(nn.Module):
    """A stack of pre-norm blocks with a final norm: (B, T, D), (B, T) -> (B, T, D), padded positions zero.

    Only real positions are computed. Where they stand is the caller's business, because a set of modality summaries
    has no order.
    """

    def __init__(self, dim: int, depth: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not _may_pack(x):
            return self._layers(x, attention_mask(mask)) * mask.unsqueeze(-1).to(x.dtype)
        known = mask.cpu()  # all that depends on the mask is found out here: one wait for the device at most
        return self._layers(x, None) if known.all() else self._packed(x, known)

    def _packed(self, x: Tensor, mask: Tensor) -> Tensor:
        """Compute on (tokens, D), the shortest sequence first, so that those of equal length are neighbours."""
        lengths, order = mask.sum(1).sort(stable=True)
        rows, columns = mask[order].nonzero(as_tuple=True)
        where = (order[rows].to(x.device), columns.to(x.device))
        found = self._layers(x[where], Packing.of(lengths, x.device))
        return found.new_zeros(x.shape).index_put(where, found)

    def _layers(self, x: Tensor, attend: Tensor | Packing | None) -> Tensor:
        for block in self.blocks:
            x = block(x, attend)
        normed: Tensor = self.norm(x)
        return normed


def _may_pack(x: Tensor) -> bool:
    """Whether sizes may depend on the mask's values, which no graph being recorded allows."""
    recording = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return x.numel() > 0 and not x.is_meta and not recording
