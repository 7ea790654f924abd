"""Recurrent language models from scratch: LSTM and the tanh RNN, regularised in the manner of AWD-LSTM.

Variational dropout and dropped words (Gal & Ghahramani, arXiv:1512.05287), dropped recurrent weights (Merity et al.,
arXiv:1708.02182), tied embeddings (Inan et al., arXiv:1611.01462; Press & Wolf, arXiv:1608.05859).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mmhub.batch import Bundle, Features
from mmhub.interfaces import ComponentConfig, Generation, Rate, Stream, Width, own_stream
from mmhub_text.embedding import vocabulary
from mmhub_text.language import CausalLM, Texts, Where, dropped_words, followed, is_dense, last_text, locked_dropout
from mmhub_text.padded import read_padded
from mmhub_text.tokenizer import Kind

State = dict[str, Tensor]  # (rows, depth, D) each: what the layers pass on


class _RecurrentLM(CausalLM):
    """Embed, run through recurrent layers, project to the width of the embeddings, and compare with those."""

    stateful: ClassVar[bool] = True
    extends = True
    default_tokenizer: ClassVar[Kind] = "word"
    cell: ClassVar[type[nn.LSTM] | type[nn.RNN]]
    passes_on: ClassVar[tuple[str, ...]]  # what a layer's state consists of

    class Config(ComponentConfig, frozen=True):
        """Settings of both recurrent language models.

        `dropout` acts on the last layer's states, `layer_dropout` between layers and `input_dropout` on the embeddings,
        each with one mask for a whole text, on the embeddings for a whole row of texts; `word_dropout` takes all
        occurrences of a word at once, `weight_dropout` recurrent weights. `tied` makes the embeddings the output
        matrix; where `embedding_dim` is not `dim`, a projection stands between. `vocab_size` follows from the
        tokenizer.
        """

        dim: Width = 256
        embedding_dim: Width = 128
        depth: Width = 1
        tied: bool = True
        dropout: Rate = 0.4
        layer_dropout: Rate = 0.3
        input_dropout: Rate = 0.3
        word_dropout: Rate = 0.1
        weight_dropout: Rate = 0.2
        vocab_size: int = 0
        generation: Generation = Generation()

    config: Config

    def __init__(self, config: Config, inputs: Mapping[str, Stream], processor: Any) -> None:
        config = msgspec.structs.replace(config, vocab_size=vocabulary(config.vocab_size, processor))
        super().__init__(config, inputs, processor)
        self.dim = config.embedding_dim
        self.carried: State = {}
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        widths = [config.embedding_dim] + [config.dim] * (config.depth - 1)
        self.layers = nn.ModuleList(self.cell(width, config.dim, batch_first=True) for width in widths)
        for layer in self.layers:
            self._start(layer)
        projected = config.tied and config.dim != config.embedding_dim
        self.project = nn.Linear(config.dim, config.embedding_dim, bias=False) if projected else None
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        if self.head is not None:
            nn.init.uniform_(self.head.weight, -0.1, 0.1)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    @staticmethod
    def _start(layer: Any) -> None:
        """Give a layer its first weights where PyTorch's are not the usual ones."""

    def embed(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        if self.training and self.config.word_dropout:
            x = dropped_words(x, ids, self.config.vocab_size, self.config.word_dropout)
        return locked_dropout(x, self.config.input_dropout, self.training)

    def states(self, stream: Features) -> tuple[Tensor, Where | None]:
        x, continues = stream.tokens, stream.continues
        if torch.compiler.is_exporting():
            return self._padded(x[:, :-1], stream.mask[:, :-1]), None
        before = self._carried(continues, x)
        if is_dense(stream):
            found, after = self._layers(x[:, :-1], before, None)
            self._carry(continues, after)
            return found, None
        parts = None if stream.parts is None else stream.parts[:, :-1]
        texts = Texts.of(followed(stream), parts, x.device)
        if not len(texts.rows):
            self._carry(continues, _unread(before, stream.mask))
            return x.new_zeros(0, self._width) + self._unused(), texts.where
        found, after = self._texts(x, texts, _starts(texts, before))
        if continues is not None:
            self._carry(continues, _ends(texts, after, before, stream.mask))
        return found, texts.where

    def read(self, stream: Features) -> tuple[Tensor, State]:
        x, rows = stream.tokens, len(stream.tokens)
        texts = Texts.of(last_text(stream), None, x.device)
        if not len(texts.rows):
            return x.new_zeros(rows, self._width), self._nothing(rows, x)
        flat, after = self._texts(x, texts, self._nothing(len(texts.rows), x))
        here = texts.rows.to(x.device)
        states = flat.new_zeros(rows, flat.shape[1]).index_put((here,), flat[texts.ends])
        return states, {n: s.new_zeros(rows, *s.shape[1:]).index_put((here,), s) for n, s in after.items()}

    @torch.no_grad()
    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        found, after = self._layers(self.embed(ids[:, None]), state, None)
        return self.logits(found[:, 0]), after

    @torch.no_grad()
    def extend(self, bundle: Bundle, state: State) -> tuple[Tensor, State]:
        found, after = self._layers(own_stream(bundle).tokens, state, None)
        return self.logits(found[:, -1]), after

    def select(self, state: State, rows: Tensor) -> State:
        return {name: tensor[rows] for name, tensor in state.items()}

    # -- the layers -------------------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        return self.output_weight.shape[1]

    def _unused(self) -> Tensor:
        """Zero, by way of every parameter: other processes wait for a gradient of each."""
        return 0 * torch.stack([parameter.sum() for parameter in self.parameters()]).sum()

    def _texts(self, x: Tensor, texts: Texts, start: State) -> tuple[Tensor, State]:
        """Run texts behind each other: their tokens of x (B, T, D) -> (tokens, D), and each text's last state."""
        packing = texts.packing
        inner = (packing.rows, packing.places)
        padded = x.new_zeros(len(packing.lengths), packing.longest, x.shape[2]).index_put(inner, x[texts.where])
        lengths = None if len(set(packing.lengths)) == 1 else torch.tensor(packing.lengths)
        found, after = self._layers(padded, start, lengths)
        return found[inner], after

    def _layers(self, x: Tensor, start: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        """(N, T, D) with the states before it -> (N, T, D) and the states after each row's last real position."""
        after: dict[str, list[Tensor]] = {name: [] for name in self.passes_on}
        for depth, layer in enumerate(self.layers):
            before = tuple(start[name][:, depth][None].to(x.dtype).contiguous() for name in self.passes_on)
            x, last = self._layer(layer, x, before, lengths)
            for name, tensor in zip(self.passes_on, last, strict=True):
                after[name].append(tensor[0])
            end = depth == len(self.layers) - 1
            x = locked_dropout(x, self.config.dropout if end else self.config.layer_dropout, self.training)
        if self.project is not None:
            x = self.project(x)
        return x, {name: torch.stack(parts, 1) for name, parts in after.items()}

    def _padded(self, x: Tensor, mask: Tensor) -> Tensor:
        """As `_layers`, of one text a row from its beginning, with sizes that depend on no value."""
        layers: Any = self.layers
        for layer in layers:
            x = read_padded(layer, x, mask)
        return x if self.project is None else self.project(x)

    def _layer(
        self, layer: Any, x: Tensor, before: tuple[Tensor, ...], lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        whole = x.shape[1]
        given: Any = x if lengths is None else pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        inputs = (given, before if len(before) > 1 else before[0])
        if self.training and self.config.weight_dropout:
            weights = {"weight_hh_l0": F.dropout(layer.weight_hh_l0, self.config.weight_dropout)}
            with warnings.catch_warnings():  # cuDNN copies weights that it does not find behind each other
                warnings.filterwarnings("ignore", message="RNN module weights are not part")
                found, last = torch.func.functional_call(layer, weights, inputs)
        else:
            found, last = layer(*inputs)
        if lengths is not None:
            found, _ = pad_packed_sequence(found, batch_first=True, total_length=whole)
        return found, last if len(before) > 1 else (last,)

    # -- what one batch passes on to the next -----------------------------------------------------------------------

    def _nothing(self, rows: int, like: Tensor) -> State:
        shape = (rows, self.config.depth, self.config.dim)
        return {name: like.new_zeros(shape) for name in self.passes_on}

    def _carried(self, continues: Tensor | None, x: Tensor) -> State:
        """The state each row starts from: what was kept where it goes on, else zero."""
        nothing = self._nothing(len(x), x)
        if continues is None or not self.carried or len(next(iter(self.carried.values()))) != len(x):
            return nothing
        on = continues[:, None, None]
        return {n: torch.where(on, self.carried[n].to(zero), zero) for n, zero in nothing.items()}

    def _carry(self, continues: Tensor | None, after: State) -> None:
        if continues is not None:
            self.carried = {name: tensor.detach() for name, tensor in after.items()}


class LSTMLM(_RecurrentLM):
    """Long short-term memory (Hochreiter & Schmidhuber 1997)."""

    cell = nn.LSTM
    passes_on = ("hidden", "cell")


class RNNLM(_RecurrentLM):
    """The plain recurrent network with tanh units (Elman 1990)."""

    cell = nn.RNN
    passes_on = ("hidden",)

    @staticmethod
    def _start(layer: Any) -> None:
        nn.init.orthogonal_(layer.weight_hh_l0)


def _starts(texts: Texts, before: State) -> State:
    """The states before each text: for the first one of a row what it starts from, else zero."""
    device = texts.where[0].device
    first, here = (texts.firsts == 0)[:, None, None].to(device), texts.rows.to(device)
    return {name: tensor[here] * first.to(tensor) for name, tensor in before.items()}


def _ends(texts: Texts, after: State, before: State, mask: Tensor) -> State:
    """The states in which the rows stop: after the last text but its last token, which the next batch begins with."""
    device = mask.device
    last = texts.firsts + torch.tensor(texts.packing.lengths) + 1 == mask.sum(1).cpu()[texts.rows]
    here, last = texts.rows[last].to(device), last.to(device)
    return {n: kept.index_put((here,), after[n][last]) for n, kept in _unread(before, mask).items()}


def _unread(before: State, mask: Tensor) -> State:
    """The states before, where a row has nothing but the token that the next batch begins with; else zero."""
    unread = (mask.sum(1) < 2)[:, None, None]
    return {name: tensor * unread.to(tensor) for name, tensor in before.items()}
