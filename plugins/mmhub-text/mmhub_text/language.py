"""What the language models trained from scratch share: where texts stand in a batch, their losses, their embeddings."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.batch import Bundle, Features, Output
from mmhub.interfaces import LanguageModel, own_stream
from mmhub.layers import Packing, chunked_cross_entropy, chunked_token_losses
from mmhub_text.language_processor import LanguageTextProcessor
from mmhub_text.tokenizer import Kind

Where = tuple[Tensor, Tensor]  # rows and columns of positions
IGNORED = -100


@dataclass(frozen=True)
class Texts:
    """Where texts of a batch stand in a flat (tokens, ...) tensor: the shortest first, those of a length together."""

    where: Where  # (tokens,) each, the row and column of every token
    packing: Packing  # of the texts
    rows: Tensor  # (N,) long, on the host: the batch row of each text
    firsts: Tensor  # (N,) long, on the host: the column of each text's first token

    @classmethod
    def of(cls, mask: Tensor, parts: Tensor | None, device: torch.device) -> Self:
        """Find the texts among the positions in `mask` (B, T); `parts` (B, T) tells those of one row apart."""
        mask = mask.cpu()
        rows, columns = mask.nonzero(as_tuple=True)
        part = torch.zeros_like(rows) if parts is None else parts.cpu()[rows, columns]
        new = torch.ones_like(rows, dtype=torch.bool)
        new[1:] = (rows[1:] != rows[:-1]) | (part[1:] != part[:-1])
        text = new.cumsum(0) - 1
        lengths, order = torch.bincount(text).sort(stable=True)
        tokens = order.argsort()[text].argsort(stable=True)
        where = (rows[tokens].to(device), columns[tokens].to(device))
        return cls(where, Packing.of(lengths, device), rows[new][order], columns[new][order])

    @property
    def ends(self) -> Tensor:
        """The last token of each text in the flat tensor, (N,) long."""
        return self.packing.starts[1:].long() - 1


class CausalLM(LanguageModel):
    """A language model whose states times one matrix, usually its embeddings, are the logits.

    `bias` (V,) is added to them if there is one.
    """

    modality: ClassVar[str] = "text"  # as an encoder's, in whose place it is written in another library's layout
    embedding: nn.Embedding
    bias: Tensor | None
    head: nn.Linear | None  # where it is not tied to the embeddings
    default_tokenizer: ClassVar[Kind]

    @classmethod
    def make_processor(cls, config: Any, tokenizer: Mapping[str, Any] | None = None) -> LanguageTextProcessor:
        return LanguageTextProcessor.from_recipe(tokenizer, default=cls.default_tokenizer)

    @classmethod
    def load_processor(cls, config: Any, state: Mapping[str, Any], files: Mapping[str, bytes]) -> LanguageTextProcessor:
        return LanguageTextProcessor.from_state(state, files)

    @property
    def output_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    @abstractmethod
    def states(self, stream: Features) -> tuple[Tensor, Where | None]:
        """Compute the states at all positions that another token of their text follows.

        -> (tokens, D) with their rows and columns, or (B, T - 1, D) with None; there, states of padding mean nothing.
        """

    @abstractmethod
    def read(self, stream: Features) -> tuple[Tensor, Any]:
        """Read the last text of each row: its last state, (B, D), zero without a text, and the state to go on from."""

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., V) fp32."""
        found = F.linear(states, self.output_weight, self.bias)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def all_logits(self, bundle: Bundle) -> Tensor:
        """Return the logits after every token of rows that are one text each, (B, T, V); after padding they are noise.

        They are held all at once: for graphs that other programs run.
        """
        stream = own_stream(bundle)
        longer = Features(F.pad(stream.tokens, (0, 0, 0, 1)), F.pad(stream.mask, (1, 0), value=True))
        states, where = self.states(longer)
        if where is not None:
            states = states.new_zeros(*stream.mask.shape, states.shape[-1]).index_put(where, states)
        return self.logits(states)

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        stream = own_stream(bundle)
        if targets is None:
            return Output(self.logits(self.read(stream)[0]))
        states, where = self.states(stream)
        goals = _goals(stream, where)
        counts = _counts(stream, where)
        loss = chunked_cross_entropy(states, self.output_weight, goals, self.bias, ignore_index=IGNORED, weights=counts)
        return Output(states.new_zeros(len(stream.tokens), 0), loss)

    def token_losses(self, bundle: Bundle, targets: Any = None) -> Tensor:
        stream = own_stream(bundle)
        states, where = self.states(stream)
        goals = _goals(stream, where)
        losses = chunked_token_losses(states, self.output_weight, goals, self.bias, ignore_index=IGNORED)
        found = losses.new_zeros(stream.mask.shape)
        if where is None:
            found[:, 1:] = losses
        else:
            found[where[0], where[1] + 1] = losses
        return found

    @torch.no_grad()
    def begin(self, bundle: Bundle) -> tuple[Tensor, Any]:
        states, kept = self.read(own_stream(bundle))
        return self.logits(states), kept


def followed(stream: Features) -> Tensor:
    """Which positions a token of the same text follows, (B, T - 1) bool."""
    mask = stream.mask[:, :-1] & stream.mask[:, 1:]
    return mask if stream.parts is None else mask & (stream.parts[:, :-1] == stream.parts[:, 1:])


def is_dense(stream: Features) -> bool:
    """Whether every row is one text without padding; waits for the device."""
    full = stream.mask.all()
    if stream.parts is not None:
        full = full & (stream.parts == stream.parts[:, :1]).all()
    return bool(full) and stream.mask.shape[1] > 1


def last_text(stream: Features) -> Tensor:
    """The positions of the last text of each row, (B, T) bool."""
    if stream.parts is None:
        return stream.mask
    last = stream.parts.masked_fill(~stream.mask, -1).amax(1, keepdim=True)
    return stream.mask & (stream.parts == last)


def _goals(stream: Features, where: Where | None) -> Tensor:
    """What the states have to predict, in their form; IGNORED where nothing is predicted or it does not count."""
    assert stream.ids is not None, "a language model reads a stream that holds ids"
    wanted = followed(stream)
    if stream.loss is not None:
        wanted = wanted & (stream.loss[:, 1:] > 0)
    goals = torch.where(wanted, stream.ids[:, 1:], IGNORED)
    return goals if where is None else goals[where]


def _counts(stream: Features, where: Where | None) -> Tensor | None:
    """What each goal counts in the loss, None where all count the same."""
    if stream.loss is None or stream.loss.dtype == torch.bool:
        return None
    counts = stream.loss[:, 1:]
    return counts if where is None else counts[where]


def dropped_words(embedded: Tensor, ids: Tensor, vocabulary: int, rate: float) -> Tensor:
    """Zero all occurrences of a share of the words, and scale up the others (Gal & Ghahramani, arXiv:1512.05287)."""
    keep = embedded.new_empty(vocabulary).bernoulli_(1 - rate).div_(1 - rate)
    return embedded * keep[ids][..., None]


def locked_dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout with one mask for all positions of a row: (B, T, D) -> (B, T, D) (Merity et al., arXiv:1708.02182)."""
    if not training or not rate:
        return x
    return x * x.new_empty(x.shape[0], 1, x.shape[2]).bernoulli_(1 - rate).div_(1 - rate)
