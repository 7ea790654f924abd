"""A modern Transformer language model from scratch: RMSNorm, rotary positions, SwiGLU, grouped queries, KV cache.

As in LLaMA (Touvron et al., arXiv:2302.13971): RMSNorm (Zhang & Sennrich, arXiv:1910.07467), rotary positions (Su et
al., arXiv:2104.09864), SwiGLU (Shazeer, arXiv:2002.05202), grouped queries (Ainslie et al., arXiv:2305.13245).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.batch import Bundle, Features
from mmhub.interfaces import ComponentConfig, Generation, Rate, Stream, Width, own_stream
from mmhub.layers import Packing, packed_attention
from mmhub_text.embedding import vocabulary
from mmhub_text.language import CausalLM, Texts, Where, dropped_words, followed, is_dense, last_text
from mmhub_text.rotary import Turn, rotate, turns
from mmhub_text.tokenizer import Kind

Attend = Tensor | Packing | None  # a (B, 1, T, T) mask, texts behind each other, or rows that are one text each
Kept = list[tuple[Tensor, Tensor]]  # keys and values of each layer
_ROOM = 64  # positions by which a cache grows at least


class TransformerLM(CausalLM):
    """Embeddings, pre-norm blocks, a last norm, and logits by the embeddings again. Only real positions are computed,
    and in training none that predicts nothing."""

    extends = True
    default_tokenizer: ClassVar[Kind] = "bpe"

    class Config(ComponentConfig, frozen=True):
        """Settings of the Transformer language model.

        `kv_heads` 0 means as many as `heads`, `hidden` 0 eight thirds of `dim`. `theta` is the base of the rotary
        positions. `dropout` acts on what each layer adds and on the embeddings, `attention_dropout` on attention
        weights, and `word_dropout` on all occurrences of a word at once. `max_length` is the context in tokens.
        `vocab_size` follows from the tokenizer.
        """

        dim: Width = 128
        depth: Width = 3
        heads: Width = 4
        kv_heads: int = 0
        hidden: int = 0
        theta: float = 10000.0
        tied: bool = True
        dropout: Rate = 0.2
        attention_dropout: Rate = 0.0
        word_dropout: Rate = 0.1
        max_length: Width = 512
        vocab_size: int = 0
        generation: Generation = Generation()

        def __post_init__(self) -> None:
            if self.dim % self.heads or (self.dim // self.heads) % 2:
                raise ValueError(f"dim must be an even multiple of heads, got {self.dim} and {self.heads}")
            if self.kv_heads < 0 or (self.kv_heads and self.heads % self.kv_heads):
                raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
            if self.hidden < 0 or not self.theta > 0:
                raise ValueError("hidden must be at least 0, and theta above 0")

    config: Config

    def __init__(self, config: Config, inputs: Mapping[str, Stream], processor: Any) -> None:
        config = msgspec.structs.replace(config, vocab_size=vocabulary(config.vocab_size, processor))
        super().__init__(config, inputs, processor)
        self.dim, self.context = config.dim, config.max_length
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.bias = None
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.apply(_start)
        for name, weight in self.named_parameters():
            if name.endswith("out.weight"):  # what the layers add up to has the scale of one
                nn.init.normal_(weight, std=0.02 * (2 * config.depth) ** -0.5)

    def embed(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        if self.training and self.config.word_dropout:
            x = dropped_words(x, ids, self.config.vocab_size, self.config.word_dropout)
        return F.dropout(x, self.config.dropout, self.training)

    def states(self, stream: Features) -> tuple[Tensor, Where | None]:
        x = stream.tokens
        if not _may_pack(x):
            return self._masked(stream)[:, :-1], None
        if is_dense(stream):
            places = torch.arange(x.shape[1] - 1, device=x.device)
            return self._layers(x[:, :-1], places, None), None
        texts = Texts.of(followed(stream), None if stream.parts is None else stream.parts[:, :-1], x.device)
        return self._layers(x[texts.where], texts.packing.places, texts.packing), texts.where

    def read(self, stream: Features) -> tuple[Tensor, Cache]:
        mask, x = last_text(stream), stream.tokens
        rows = len(x)
        if not _may_pack(x):
            last = (mask * torch.arange(1, mask.shape[1] + 1, device=x.device)).amax(1) - 1
            found = self._masked(stream)[torch.arange(rows, device=x.device), last.clamp(min=0)]
            return found * (last >= 0)[:, None].to(x.dtype), Cache.empty(rows, self.config, x)
        texts = Texts.of(mask, None, x.device)
        kept: Kept = []
        flat = self._layers(x[texts.where], texts.packing.places, texts.packing, kept)
        here = texts.rows.to(x.device)
        states = flat.new_zeros(rows, self.dim).index_put((here,), flat[texts.ends])
        return states, Cache.of(kept, texts, rows, self.config, x)

    @torch.no_grad()
    def step(self, ids: Tensor, state: Cache) -> tuple[Tensor, Cache]:
        return self._go_on(self.embed(ids[:, None]), state)

    @torch.no_grad()
    def extend(self, bundle: Bundle, state: Cache) -> tuple[Tensor, Cache]:
        return self._go_on(own_stream(bundle).tokens, state)

    def _go_on(self, x: Tensor, state: Cache) -> tuple[Tensor, Cache]:
        """Read more tokens of each row, (B, T, D)."""
        more = x.shape[1]
        state = state.grown(more)
        longest = state.longest + more
        places = state.lengths[:, None] + torch.arange(more, device=x.device)
        seen = torch.arange(longest, device=x.device)
        attend = None if state.even and more == 1 else (seen <= places[..., None])[:, None]
        turn = turns(places, self.config.dim // self.config.heads, self.config.theta, x.dtype)
        layers: Any = zip(self.blocks, state.layers, strict=True)
        for block, memory in layers:
            x = block.step(x, turn, attend, memory, places, longest)
        return self.logits(self.norm(x[:, -1])), replace(state, lengths=state.lengths + more, longest=longest)

    def select(self, state: Cache, rows: Tensor) -> Cache:
        layers = [(keys[rows], values[rows]) for keys, values in state.layers]
        return replace(state, layers=layers, lengths=state.lengths[rows])

    def _masked(self, stream: Features) -> Tensor:
        """All positions, (B, T, D), with sizes that depend on no value."""
        mask, parts = stream.mask, stream.parts
        column = torch.arange(mask.shape[1], device=mask.device)
        attend = (column <= column[:, None]) & mask[:, None, :]
        first = torch.zeros_like(mask, dtype=torch.long)
        if parts is not None:
            attend = attend & (parts[:, :, None] == parts[:, None, :])
            new = F.pad(parts[:, 1:] != parts[:, :-1], (1, 0))
            first = (new * column).cummax(1).values
        attend = attend | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        return self._layers(stream.tokens, column - first, attend[:, None])

    def _layers(self, x: Tensor, places: Tensor, attend: Attend, kept: Kept | None = None) -> Tensor:
        turn = turns(places, self.config.dim // self.config.heads, self.config.theta, x.dtype)
        for block in self.blocks:
            x = block(x, turn, attend, kept)
        normed: Tensor = self.norm(x)
        return normed


class Block(nn.Module):
    """Pre-norm attention to the text so far, and a SwiGLU layer."""

    def __init__(self, config: TransformerLM.Config) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(config.dim, eps=1e-6), nn.RMSNorm(config.dim, eps=1e-6)
        self.attention = Attention(config)
        self.mlp = SwiGLU(config.dim, config.hidden or _round(config.dim * 8 / 3), config.dropout)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, turn: Turn, attend: Attend, kept: Kept | None = None) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), turn, attend, kept))
        return x + self.drop(self.mlp(self.norm2(x)))

    def step(
        self, x: Tensor, turn: Turn, mask: Tensor | None, memory: tuple[Tensor, Tensor], at: Tensor, seen: int
    ) -> Tensor:
        """More positions of each row, (B, T, D): keys and values go into `memory`, at the places `at` (B, T)."""
        x = x + self.attention.step(self.norm1(x), turn, mask, memory, at, seen)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Causal attention over (B, T, D), or over the texts of (tokens, D); several query heads share keys and values."""

    def __init__(self, config: TransformerLM.Config) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.dropout = config.attention_dropout
        width = config.dim // config.heads
        self.qkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * width, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def _split(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Project and turn: query (..., heads, width), key and value (..., kv_heads, width)."""
        turned, value = (
            self.qkv(x)
            .unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
            .split((self.heads + self.kv_heads, self.kv_heads), dim=-2)
        )
        query, key = rotate(turned, turn).split((self.heads, self.kv_heads), dim=-2)
        return query, key, value

    def forward(self, x: Tensor, turn: Turn, attend: Attend, kept: Kept | None = None) -> Tensor:
        query, key, value = self._split(x, turn)
        if kept is not None:
            kept.append((key, value))
        drop = self.dropout if self.training else 0.0
        if isinstance(attend, Packing):
            y = packed_attention(query, key, value, attend, causal=True, dropout=drop)
        else:
            if self.kv_heads != self.heads:
                key, value = (t.repeat_interleave(self.heads // self.kv_heads, dim=-2) for t in (key, value))
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attend, is_causal=attend is None, dropout_p=drop
            ).transpose(1, 2)
        out: Tensor = self.out(y.flatten(-2))
        return out

    def step(
        self, x: Tensor, turn: Turn, mask: Tensor | None, memory: tuple[Tensor, Tensor], at: Tensor, seen: int
    ) -> Tensor:
        query, key, value = self._split(x, turn)
        where = (torch.arange(len(x), device=x.device)[:, None], at)
        memory[0].index_put_(where, key)
        memory[1].index_put_(where, value)
        k, v = (part[:, :seen].transpose(1, 2) for part in memory)
        group = self.heads // self.kv_heads
        grouped = query.transpose(1, 2).unflatten(1, (self.kv_heads, group)).flatten(2, 3)  # heads that share keys, as
        if mask is not None and x.shape[1] > 1:  # if they were positions of one
            mask = mask.repeat(1, 1, group, 1)
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
        out: Tensor = self.out(y.unflatten(2, (group, -1)).flatten(1, 2).transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.both = nn.Linear(dim, 2 * hidden, bias=False)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, -1)
        out: Tensor = self.out(self.drop(F.silu(gate) * value))
        return out


@dataclass(frozen=True)
class Cache:
    """Keys and values of what stands already; a row's next position is its length."""

    layers: Kept  # (B, room, kv_heads, width) each
    lengths: Tensor  # (B,) long, positions of each row so far
    longest: int
    even: bool  # are all rows of one length?

    @classmethod
    def of(cls, kept: Kept, texts: Texts, rows: int, config: TransformerLM.Config, like: Tensor) -> Cache:
        """Gather what the layers gave for texts, at most one a row."""
        longest = texts.packing.longest
        here, places = texts.rows.to(like.device), texts.packing.places
        where = (texts.where[0], places)

        def gather(flat: Tensor) -> Tensor:
            return flat.new_zeros(rows, longest + _ROOM, *flat.shape[1:]).index_put_(where, flat.detach())

        lengths = torch.zeros(rows, dtype=torch.long, device=like.device)
        lengths[here] = texts.packing.starts.diff().long()
        layers = [(gather(keys), gather(values)) for keys, values in kept]
        numbers = texts.packing.lengths
        return cls(layers, lengths, longest, len(numbers) == rows and len(set(numbers)) == 1)

    @classmethod
    def empty(cls, rows: int, config: TransformerLM.Config, like: Tensor) -> Cache:
        """Return a cache of nothing, where a graph is recorded of which only the logits are wanted."""
        return cls([], torch.zeros(rows, dtype=torch.long, device=like.device), 0, True)

    def grown(self, positions: int) -> Cache:
        """Return a cache with room for so many more: itself where there is, else one that is half as large again."""
        room = self.layers[0][0].shape[1]
        if self.longest + positions <= room:
            return self
        more = max(_ROOM, room // 2, positions)
        layers = [(F.pad(k, (0, 0, 0, 0, 0, more)), F.pad(v, (0, 0, 0, 0, 0, more))) for k, v in self.layers]
        return replace(self, layers=layers)


def _start(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


def _round(width: float) -> int:
    """The next multiple of 16, which matrix kernels like."""
    return -(-int(width) // 16) * 16


def _may_pack(x: Tensor) -> bool:
    """Whether sizes may depend on the mask's values, which no graph being recorded allows."""
    recording = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return x.numel() > 0 and not x.is_meta and not recording
