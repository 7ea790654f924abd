"""From an encoder's tokens to a language model's: fewer of them where that is wanted, and of its width."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.errors import UsageError
from mmhub.interfaces import ComponentConfig, Width

_MOST = {"hidden": 65_536, "queries": 4096, "depth": 64, "stack": 64, "shuffle": 64}


class ProjectorConfig(ComponentConfig, frozen=True):
    """How the items of one modality become tokens of a language model.

    `kind`: "linear"; "mlp", two layers with GELU between them, `hidden` wide, 0 = as wide as the language model, as in
    LLaVA-1.5 (Liu et al., arXiv:2310.03744); or "resampler", a fixed number of `queries` that look at an item through
    `depth` layers of `heads` heads, as in Flamingo (Alayrac et al., arXiv:2204.14198).
    Before that, `stack` puts so many neighbouring tokens of a sequence into one, and `shuffle` each square of shuffle x
    shuffle tokens of a square grid, row by row, as in Idefics3 (Laurencon et al., arXiv:2408.12637); what lacks at the
    end of either is zeros. `norm` normalises what is projected.
    """

    kind: Literal["linear", "mlp", "resampler"] = "linear"
    hidden: Annotated[int, msgspec.Meta(ge=0)] = 0
    queries: Width = 32
    depth: Width = 2
    heads: Width = 4
    stack: Width = 1
    shuffle: Width = 1
    norm: bool = False

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} of a projector is {getattr(self, name)}, and at most {most}")
        if self.stack > 1 and self.shuffle > 1:
            raise ValueError("stack is for sequences and shuffle for square grids: one of them has to be 1")
        if self.hidden and self.kind != "mlp":
            raise ValueError(f'hidden is for the kind "mlp", and this is {self.kind!r}')


class Projector(nn.Module):
    """Tokens (N, T, width) with a mask (N, T) -> tokens (N, t, dim), padded ones zero, with a mask (N, t).

    It knows no positions, which are the encoders' business. An item without tokens has none afterwards.
    """

    def __init__(self, config: ProjectorConfig, width: int, dim: int) -> None:
        super().__init__()
        if config.kind == "resampler" and dim % config.heads:
            what = f"a resampler of {config.heads} heads does not divide the language model's width, {dim}"
            raise UsageError(what, "set heads of the projector to a divisor of it")
        self.config = config
        width *= config.stack * config.shuffle**2
        self.norm = nn.LayerNorm(width) if config.norm else None
        self.body = _body(config, width, dim)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Project items.

        Raises:
            UsageError: the tokens of an item that is to be shuffled are no square grid.
        """
        if not tokens.shape[1]:
            tokens, mask = F.pad(tokens, (0, 0, 0, 1)), F.pad(mask, (0, 1))
        if self.config.stack > 1 or self.config.kind == "resampler":  # where tokens meet
            tokens = tokens.masked_fill(~mask[..., None], 0)
        if self.config.stack > 1:
            tokens, mask = _stacked(tokens, mask, self.config.stack)
        elif self.config.shuffle > 1:
            tokens, mask = _shuffled(tokens, mask, self.config.shuffle)
        tokens = tokens if self.norm is None else self.norm(tokens)
        if isinstance(self.body, Resampler):
            tokens, mask = self.body(tokens, mask), mask.any(1, keepdim=True).expand(-1, self.config.queries)
        else:
            tokens = self.body(tokens)
        return tokens.masked_fill(~mask[..., None], 0), mask

    def token_count(self, tokens: int) -> int:
        """Return how many tokens become of so many of one item.

        Raises:
            UsageError: they are no square grid, and to be shuffled.
        """
        if self.config.shuffle > 1:
            tokens = math.ceil(_side(tokens) / self.config.shuffle) ** 2
        tokens = math.ceil(tokens / self.config.stack)
        return self.config.queries * bool(tokens) if self.config.kind == "resampler" else tokens


class Resampler(nn.Module):
    """A fixed number of learned queries that look at items and at each other: (N, T, width) -> (N, queries, dim).

    Where an item has no token they see nothing but themselves.
    """

    def __init__(self, width: int, dim: int, queries: int, depth: int, heads: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, dim)
        self.queries = nn.Parameter(torch.empty(queries, dim))
        nn.init.normal_(self.queries, std=0.02)
        self.layers = nn.ModuleList(_Look(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        tokens = self.input(tokens)
        x = self.queries.to(tokens.dtype).expand(len(tokens), -1, -1)
        seen = F.pad(mask, (0, x.shape[1]), value=True)[:, None, None]
        for layer in self.layers:
            x = layer(x, tokens, seen)
        found: Tensor = self.norm(x)
        return found


class _Look(nn.Module):
    """Attention of queries to tokens and queries, and a GELU feed-forward layer, with norms in front."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.token_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, tokens: Tensor, seen: Tensor) -> Tensor:
        """x (N, Q, D), tokens (N, T, D), seen (N, 1, 1, T + Q) -> (N, Q, D)."""
        normed = self.norm(x)
        both = self.key_value(torch.cat([self.token_norm(tokens), normed], 1))
        query = self.query(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = both.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


def _body(config: ProjectorConfig, width: int, dim: int) -> nn.Module:
    if config.kind == "resampler":
        return Resampler(width, dim, config.queries, config.depth, config.heads)
    if config.kind == "linear":
        return nn.Linear(width, dim)
    hidden = config.hidden or dim
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim))


def _stacked(tokens: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Put `size` neighbours into one: (N, T, D) -> (N, t, size * D). Padded tokens are zero."""
    more = -tokens.shape[1] % size
    tokens, mask = F.pad(tokens, (0, 0, 0, more)), F.pad(mask, (0, more))
    return tokens.unflatten(1, (-1, size)).flatten(2), mask.unflatten(1, (-1, size)).any(2)


def _shuffled(tokens: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Put squares of size x size into one: (N, T, D) -> (N, t, size * size * D)."""
    lengths = mask.sum(1).tolist()
    if len(set(lengths)) <= 1:
        found = _squares(tokens[:, : max(lengths, default=0)], size)
        return found, mask[:, :1].expand(found.shape[:2])
    each = [_squares(item[None, :length], size)[0] for item, length in zip(tokens, lengths, strict=True)]
    counts = torch.tensor([len(item) for item in each], device=mask.device) * mask.any(1)
    padded = nn.utils.rnn.pad_sequence(each, batch_first=True)
    return padded, torch.arange(padded.shape[1], device=mask.device) < counts[:, None]


def _squares(tokens: Tensor, size: int) -> Tensor:
    """(N, g * g, D) -> (N, (g / size)^2, size * size * D), rows before columns in both; none -> one of zeros."""
    side = _side(tokens.shape[1])
    more = -side % size if side else size
    grid = F.pad(tokens.unflatten(1, (side, side)), (0, 0, 0, more, 0, more))
    squares = grid.unflatten(1, (-1, size)).unflatten(3, (-1, size)).transpose(2, 3)
    return squares.flatten(3).flatten(1, 2)


def _side(tokens: int) -> int:
    """The side of a square grid of so many tokens."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UsageError(
            f"shuffle takes items whose tokens are a square grid, and one has {tokens}",
            "take an encoder that gives a grid without further tokens, or stack instead of shuffle",
        )
    return side
