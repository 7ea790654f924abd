"""A Transformer text encoder from scratch (Vaswani et al. 2017, arXiv:1706.03762; pre-norm, Xiong et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
from torch import Tensor

from mmhub.batch import Features
from mmhub.interfaces import ComponentConfig, Encoder
from mmhub.layers import TransformerEncoder, sinusoidal_positions
from mmhub_text.embedding import WordEmbedding, check_fractions, vocabulary
from mmhub_text.processor import TextProcessor


class Transformer(Encoder):
    """Embeddings with sinusoidal positions, then pre-norm self-attention blocks."""

    modality: ClassVar[str] = "text"
    padding_invariant = True

    class Config(ComponentConfig, frozen=True):
        """Settings of the Transformer encoder.

        `word_dropout` replaces whole tokens by the unknown token in training. Texts are cut to `max_length` tokens.
        `vocab_size` follows from the tokenizer.
        """

        dim: int = 256
        depth: int = 4
        heads: int = 4
        mlp_ratio: float = 4.0
        dropout: float = 0.1
        word_dropout: float = 0.1
        max_length: int = 512
        vocab_size: int = 0

        def __post_init__(self) -> None:
            check_fractions(dropout=self.dropout, word_dropout=self.word_dropout)
            if min(self.dim, self.depth, self.heads, self.max_length) < 1:
                raise ValueError("dim, depth, heads and max_length must be at least 1")
            if self.dim % self.heads:
                raise ValueError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")

    def __init__(self, config: Config, processor: TextProcessor) -> None:
        config = msgspec.structs.replace(config, vocab_size=vocabulary(config.vocab_size, processor))
        super().__init__(config, processor)
        self.dim = config.dim
        self.embed = WordEmbedding(
            config.vocab_size,
            config.dim,
            dropout=config.dropout,
            word_dropout=config.word_dropout,
            unknown=processor.empty_id,
        )
        self.layers = TransformerEncoder(config.dim, config.depth, config.heads, config.mlp_ratio, config.dropout)

    @classmethod
    def make_processor(cls, config: Config, tokenizer: Mapping[str, Any] | None = None) -> TextProcessor:
        return TextProcessor.from_recipe(tokenizer, default="bpe", max_length=config.max_length)

    @classmethod
    def load_processor(cls, config: Config, state: Mapping[str, Any], files: Mapping[str, bytes]) -> TextProcessor:
        return TextProcessor.from_state(state, files)

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        """Encode ids (N, S) to tokens (N, S, D)."""
        words = self.embed(data) * self.dim**0.5  # brings the embeddings to the scale of the positions
        places = sinusoidal_positions(data.shape[1], self.dim, device=data.device).to(words.dtype)
        return Features(tokens=self.layers(words + places, mask), mask=mask)
