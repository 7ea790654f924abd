"""Recurrent text encoders from scratch: LSTM (Hochreiter & Schmidhuber 1997) and the tanh RNN (Elman 1990)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mmhub.batch import Features
from mmhub.interfaces import ComponentConfig, Encoder
from mmhub.layers import masked_mean
from mmhub_text.embedding import WordEmbedding, check_fractions, vocabulary
from mmhub_text.padded import read_padded
from mmhub_text.processor import TextProcessor


class _Recurrent(Encoder):
    """Embed tokens and run them through a stack of recurrent layers; packed, so that padding is never read."""

    modality: ClassVar[str] = "text"
    padding_invariant = True
    cell: ClassVar[type[nn.LSTM] | type[nn.RNN]]

    class Config(ComponentConfig, frozen=True):
        """Settings of both recurrent encoders.

        `dim` is the width of the tokens, both directions together. `word_dropout` replaces whole tokens by the unknown
        token in training, so that it is learned and no single word is relied on (Iyyer et al. 2015, section 3.2).
        `pooling = "max-mean"` summarises a text by the maximum and the mean of its tokens, 2 * `dim` numbers. Texts are
        cut to `max_length` tokens. `vocab_size` follows from the tokenizer.
        """

        dim: int = 256
        embedding_dim: int = 128
        depth: int = 1
        bidirectional: bool = True
        dropout: float = 0.3
        embedding_dropout: float = 0.3
        word_dropout: float = 0.2
        pooling: Literal["mean", "max-mean"] = "max-mean"
        max_length: int = 512
        vocab_size: int = 0

        def __post_init__(self) -> None:
            check_fractions(
                dropout=self.dropout, embedding_dropout=self.embedding_dropout, word_dropout=self.word_dropout
            )
            if min(self.dim, self.embedding_dim, self.depth, self.max_length) < 1:
                raise ValueError("dim, embedding_dim, depth and max_length must be at least 1")
            if self.bidirectional and self.dim % 2:
                raise ValueError(f"dim is shared by two directions and must be even, got {self.dim}")

    def __init__(self, config: Config, processor: TextProcessor) -> None:
        config = msgspec.structs.replace(config, vocab_size=vocabulary(config.vocab_size, processor))
        super().__init__(config, processor)
        self.dim = config.dim
        self.pooled_dim = 2 * config.dim if config.pooling == "max-mean" else None
        self.embed = WordEmbedding(
            config.vocab_size,
            config.embedding_dim,
            dropout=config.embedding_dropout,
            word_dropout=config.word_dropout,
            unknown=processor.empty_id,
        )
        self.layers = self.cell(
            config.embedding_dim,
            config.dim // 2 if config.bidirectional else config.dim,
            num_layers=config.depth,
            bidirectional=config.bidirectional,
            batch_first=True,
            dropout=config.dropout if config.depth > 1 else 0.0,
        )
        self.drop = nn.Dropout(config.dropout)

    @classmethod
    def make_processor(cls, config: Config, tokenizer: Mapping[str, Any] | None = None) -> TextProcessor:
        return TextProcessor.from_recipe(tokenizer, default="word", max_length=config.max_length)

    @classmethod
    def load_processor(cls, config: Config, state: Mapping[str, Any], files: Mapping[str, bytes]) -> TextProcessor:
        return TextProcessor.from_state(state, files)

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        """Encode ids (N, S) to tokens (N, S, D)[, pooled (N, 2 D)]."""
        tokens = self.drop(self._states(self.embed(data), mask))
        tokens = tokens * mask.unsqueeze(-1).to(tokens.dtype)
        pooled = _max_and_mean(tokens, mask) if self.pooled_dim else None
        return Features(tokens=tokens, mask=mask, pooled=pooled)

    def _states(self, words: Tensor, mask: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return read_padded(self.layers, words, mask)
        lengths = mask.sum(1).clamp(min=1).cpu()  # packing wants them on the CPU
        packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
        states, _ = self.layers(packed)
        tokens, _ = pad_packed_sequence(states, batch_first=True, total_length=words.shape[1])
        return tokens


class LSTM(_Recurrent):
    """Long short-term memory."""

    cell = nn.LSTM


class RNN(_Recurrent):
    """The plain recurrent network with tanh units."""

    cell = nn.RNN


def _max_and_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Join maximum and mean of the real tokens: (N, T, D) -> (N, 2 D)."""
    lowest = torch.finfo(tokens.dtype).min
    largest = tokens.masked_fill(~mask.unsqueeze(-1), lowest).amax(1)
    return torch.cat((largest, masked_mean(tokens, mask)), dim=-1)
