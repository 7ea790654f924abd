"""A Transformer decoder from scratch that writes text about whatever an encoder read (Vaswani et al. 2017).

Pre-norm (Xiong et al. 2020, arXiv:2002.04745), with sinusoidal positions. Padding is right of the real tokens, so
causal attention needs no mask, and everything but attention is computed for real tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.batch import Bundle, Output
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import ComponentConfig, Generation, Policy, Stream, TextDecoder
from mmhub.interfaces.labels import at_row
from mmhub.layers import chunked_cross_entropy, sinusoidal_positions
from mmhub_text.embedding import WordEmbedding, check_fractions, vocabulary
from mmhub_text.language_processor import LanguageTextProcessor
from mmhub_text.reading import Joined
from mmhub_text.targets import one_text
from mmhub_text.tokenizer import SPECIALS

IGNORE = -100  # the target of padding
_CHUNK = 2**24  # logits that are held at once where each token's loss is asked for
Where = tuple[Tensor, Tensor]  # rows and columns of the real tokens of (B, T), each (tokens,)
KeyValue = tuple[Tensor, Tensor]  # each (B, heads, T, d)


class Seq2Seq(TextDecoder):
    """Causal self-attention over what is written, and attention to what is read.

    That are the tokens of the `fused` or only stream; of several streams, such as a picture and a question about it,
    those of all (see `mmhub_text.reading`). A row may lack any of them.

    In training the loss is smoothed by `label_smoothing`; in evaluation mode it is the plain mean -log P of a target
    token, the end included, so that losses compare whatever the smoothing.
    """

    tasks: ClassVar[tuple[str, ...]] = (
        "translation",
        "captioning",
        "visual-question-answering",
        "speech-recognition",
    )
    start: int

    class Config(ComponentConfig, frozen=True):
        """Settings of the sequence-to-sequence decoder.

        `tie` says which matrices are one: with "output" tokens are scored by the embeddings they are read with (Press
        and Wolf, arXiv:1608.05859); with "encoder" these are those of the text encoder as well, whose width and
        vocabulary must be the same. `vocab_size` follows from the tokenizer.
        """

        dim: int = 256
        depth: int = 3
        heads: int = 4
        mlp_ratio: float = 4.0
        dropout: float = 0.1
        label_smoothing: float = 0.1
        tie: Literal["none", "output", "encoder"] = "output"
        vocab_size: int = 0
        generation: Generation = Generation()

        def __post_init__(self) -> None:
            check_fractions(dropout=self.dropout, label_smoothing=self.label_smoothing)
            if min(self.dim, self.depth, self.heads) < 1 or self.mlp_ratio <= 0:
                raise ValueError("dim, depth and heads must be at least 1, and mlp_ratio above 0")
            if self.dim % self.heads:
                raise ValueError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")

    def __init__(self, config: Config, inputs: Mapping[str, Stream], processor: LanguageTextProcessor) -> None:
        config = msgspec.structs.replace(config, vocab_size=vocabulary(config.vocab_size, processor))
        super().__init__(config, inputs, processor)
        self.source = "fused" if "fused" in inputs else next(iter(inputs))
        self.joined = Joined(inputs, config.dim) if len(inputs) > 1 and self.source != "fused" else None
        self.start, self.end = _frame(processor)
        self.embed = WordEmbedding(config.vocab_size, config.dim, dropout=config.dropout, word_dropout=0.0, unknown=0)
        width = inputs[self.source].dim if self.joined is None else config.dim
        hidden = int(config.dim * config.mlp_ratio)
        self.blocks: Any = nn.ModuleList(
            Block(config.dim, width, config.heads, hidden, config.dropout) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False) if config.tie == "none" else None

    @classmethod
    def make_processor(cls, config: Config, tokenizer: Mapping[str, Any] | None = None) -> LanguageTextProcessor:
        return LanguageTextProcessor.from_recipe(tokenizer, default="bpe")

    @classmethod
    def load_processor(
        cls, config: Config, state: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> LanguageTextProcessor:
        return LanguageTextProcessor.from_state(state, files)

    def tie(self, encoders: Mapping[str, Any]) -> None:
        """Share the embeddings with the text encoder, if the configuration says so.

        Raises:
            UsageError: there is none trained from scratch, or its width or vocabulary is another.
        """
        if self.config.tie != "encoder":
            return
        encoder = encoders.get("text")
        theirs = getattr(encoder, "embed", None)
        if encoder is None or not isinstance(theirs, WordEmbedding):
            raise UsageError('tie = "encoder" needs a text encoder that is trained from scratch', _UNTIE)
        if theirs.weight.shape != self.embed.weight.shape:
            sizes = (" x ".join(map(str, weight.shape)) for weight in (theirs.weight, self.embed.weight))
            raise UsageError("the encoder's embeddings are {}, the decoder's {}".format(*sizes), _UNTIE)
        _check_same_tokens(encoder.processor, self.processor)
        self.embed.weight = theirs.weight

    # -- training and scoring ---------------------------------------------------------------------------------------

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        """Turn texts into the ids to be written, the end included: (B, L) long, padded with -100.

        Of several texts for one row, it is the most frequent one that is trained on, or the first of these.
        """
        rows = [self._labels(target, row) for row, target in enumerate(targets)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)

    def _labels(self, target: Any, row: int) -> Tensor:
        try:
            ids = self.processor.prompt(one_text(target), Policy())
        except InputError as error:
            raise at_row(error, row) from None
        ids = ids[1:] if len(ids) and ids[0] == self.processor.begin_id else ids
        return torch.cat((ids, ids.new_tensor([self.end])))

    def weigh(self, targets: Tensor) -> Tensor:
        """Return how many tokens each row is to write, (B,)."""
        return (targets != IGNORE).sum(1)

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        """With targets (B, L), return the mean loss of their tokens and no logits; else logits (B, V) of the first."""
        if targets is None:
            return Output(logits=self.begin(bundle)[0])
        hidden, wanted, _ = self._hidden(bundle, targets)
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss = chunked_cross_entropy(hidden, self._matrix, wanted, ignore_index=IGNORE, label_smoothing=smoothing)
        return Output(logits=hidden.new_zeros(len(targets), 0), loss=loss, mask=targets != IGNORE)

    def token_losses(self, bundle: Bundle, targets: Tensor | None = None) -> Tensor:
        """Return -log P of each target token given those before it, (B, L) fp32; 0 at padding."""
        if targets is None:
            raise ValueError("a sequence-to-sequence decoder scores targets")
        hidden, wanted, where = self._hidden(bundle, targets)
        hidden, wanted, step = hidden.flatten(0, -2), wanted.flatten(), max(1, _CHUNK // len(self._matrix))
        found = [
            F.cross_entropy(self._logits(h), t, reduction="none", ignore_index=IGNORE)
            for h, t in zip(hidden.split(step), wanted.split(step), strict=True)
        ]
        losses = torch.cat(found)
        return losses.view(targets.shape) if where is None else _spread(losses, where, targets.shape)

    def all_logits(self, bundle: Bundle, ids: Tensor) -> Tensor:
        """Return the logits after each of the ids (B, L) that are written so far, the start included: (B, L, V).

        They are held all at once: for graphs that other programs run.
        """
        places = sinusoidal_positions(ids.shape[1], self.config.dim, device=ids.device)
        source, mask = self._read(bundle)
        x = self._embedded(ids, places)
        for block in self.blocks:
            x = block(x, source, mask, None, ids.shape)
        return self._logits(self.norm(x))

    def _hidden(self, bundle: Bundle, targets: Tensor) -> tuple[Tensor, Tensor, Where | None]:
        """Return the last states of all tokens, (tokens, D), what each is to predict, (tokens,), and where they stand.

        While a graph is recorded, whose shapes may not depend on values, padding is computed too: (B, L, D), (B, L).
        """
        start = targets.new_full((len(targets), 1), self.start)
        given = torch.cat((start, targets[:, :-1]), 1).clamp(min=0)
        places = sinusoidal_positions(targets.shape[1], self.config.dim, device=targets.device)
        source, mask = self._read(bundle)
        where = None if _recording() else _places(targets != IGNORE)
        if where is None:
            x, wanted = self._embedded(given, places), targets
        else:
            x, wanted = self._embedded(given[where], places[where[1]]), targets[where]
        for block in self.blocks:
            x = block(x, source, mask, where, targets.shape)
        return self.norm(x), wanted, where

    def _embedded(self, ids: Tensor, places: Tensor) -> Tensor:
        words = self.embed(ids) * self.config.dim**0.5  # brings the embeddings to the scale of the positions
        return words + places.to(words.dtype)

    def _read(self, bundle: Bundle) -> tuple[Tensor, Tensor]:
        """Return the tokens to attend to, (B, S, D), and their mask for attention, (B, 1, 1, S).

        A row without any real token attends to one zero vector: attention to nothing is not a number.
        """
        if self.joined is None:
            tokens, mask = bundle[self.source].tokens, bundle[self.source].mask
        else:
            tokens, mask = self.joined(bundle)
        empty = ~mask.any(1, keepdim=True)
        mask = torch.cat((mask[:, :1] | empty, mask[:, 1:]), 1)
        return tokens, mask[:, None, None, :]

    @property
    def _matrix(self) -> Tensor:
        return self.embed.weight if self.output is None else self.output.weight

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self._matrix).float()

    # -- writing ----------------------------------------------------------------------------------------------------

    def begin(self, bundle: Bundle) -> tuple[Tensor, State]:
        source, mask = self._read(bundle)
        read = tuple(block.cross.key_value(source) for block in self.blocks)
        rows = torch.arange(len(source), device=source.device)
        state = State(rows, mask, read, written=(None,) * len(read), length=0)
        return self.step(torch.full_like(rows, self.start), state)

    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        places = sinusoidal_positions(state.length + 1, self.config.dim, device=ids.device)[-1:]
        x, written = self._embedded(ids[:, None], places), []
        for block, read, before in zip(self.blocks, state.read, state.written, strict=True):
            x, kept = block.step(x, read, state.mask, before)
            written.append(kept)
        after = replace(state, written=tuple(written), length=state.length + 1)
        return self._logits(self.norm(x[:, 0])), after

    def select(self, state: State, rows: Tensor) -> State:
        def choose(pairs: Any) -> Any:
            return tuple(None if pair is None else (pair[0][rows], pair[1][rows]) for pair in pairs)

        sources, written = state.sources[rows], choose(state.written)
        if torch.equal(sources, state.sources):  # as when beams of one text change places: most steps
            return replace(state, written=written)
        return State(sources, state.mask[rows], choose(state.read), written, state.length)


@dataclass(frozen=True)
class State:
    """What is kept between steps: keys and values of what was read, and of what was written, by block."""

    sources: Tensor  # (R,) long, which row of the bundle each row writes about
    mask: Tensor  # (R, 1, 1, S) bool
    read: tuple[KeyValue, ...]
    written: tuple[KeyValue | None, ...]
    length: int  # tokens written


class Block(nn.Module):
    """Causal self-attention, attention to what was read, and a GELU feed-forward layer, each pre-norm."""

    def __init__(self, dim: int, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.own, self.cross = CausalAttention(dim, heads, dropout), CrossAttention(dim, width, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor, where: Where | None, shape: torch.Size) -> Tensor:
        """Change tokens (tokens, D) that stand at `where` in (B, T) = `shape`, or (B, T, D) where it is None."""
        x = x + self.drop(self.own(self.norm1(x), where, shape))
        x = x + self.drop(self.cross(self.norm2(x), self.cross.key_value(source), mask, where, shape))
        return x + self.drop(self.mlp(self.norm3(x)))

    def step(self, x: Tensor, read: KeyValue, mask: Tensor, before: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """Change the next token of each row, (B, 1, D); return its keys and values behind those before, too."""
        found, kept = self.own.step(self.norm1(x), before)
        x = x + self.drop(found)
        x = x + self.drop(self.cross(self.norm2(x), read, mask, None, x.shape[:2]))
        return x + self.drop(self.mlp(self.norm3(x))), kept


class CausalAttention(nn.Module):
    """Attention of each token to itself and those before it in its row."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, where: Where | None, shape: torch.Size) -> Tensor:
        q, k, v = _spread(self.qkv(x), where, shape).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True)
        return self.out(_gather(y.transpose(1, 2).flatten(2), where))

    def step(self, x: Tensor, before: KeyValue | None) -> tuple[Tensor, KeyValue]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if before is not None:
            k, v = torch.cat((before[0], k), 2), torch.cat((before[1], v), 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)


class CrossAttention(nn.Module):
    """Attention of each token to what was read, whose width need not be its own."""

    def __init__(self, dim: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(width, 2 * dim), nn.Linear(dim, dim)

    def key_value(self, source: Tensor) -> KeyValue:
        """Return keys and values of what was read, (B, S, width)."""
        k, v = self.kv(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x: Tensor, read: KeyValue, mask: Tensor, where: Where | None, shape: torch.Size) -> Tensor:
        q = _spread(self.query(x), where, shape).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, *read, attn_mask=mask, dropout_p=drop)
        return self.out(_gather(y.transpose(1, 2).flatten(2), where))


def _spread(flat: Tensor, where: Where | None, shape: torch.Size) -> Tensor:
    """Put (tokens, ...) at their places in (B, T, ...), zeros elsewhere."""
    return flat if where is None else flat.new_zeros(*shape, *flat.shape[1:]).index_put(where, flat)


def _places(real: Tensor) -> Where:
    rows, columns = real.nonzero(as_tuple=True)
    return rows, columns


def _gather(padded: Tensor, where: Where | None) -> Tensor:
    return padded if where is None else padded[where]


def _recording() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


_UNTIE = 'take the encoder "transformer" of the same dim and tokenizer, or tie = "output"'


def _frame(processor: LanguageTextProcessor) -> tuple[int, int]:
    """The ids that begin and end what is written; a tokenizer that has but an end uses it for both, as BART does."""
    if processor.end_id is None:
        raise UsageError("the tokenizer has no end token, without which no text ends", "take another, or train one")
    return (processor.end_id if processor.begin_id is None else processor.begin_id), processor.end_id


def _check_same_tokens(theirs: Any, ours: Any) -> None:
    """Refuse to share embeddings of different tokens; the first ones are special, and differ in name alone."""
    first, second = ({i: token for token, i in p.tokenizer.get_vocab().items()} for p in (theirs, ours))
    for number in range(len(SPECIALS), len(first)):
        if first.get(number) != second.get(number):
            what = f"token {number} is {first.get(number)!r} to the encoder and {second.get(number)!r} to the decoder"
            if _normal(theirs) != _normal(ours):
                what += "; only one of them composes Unicode characters (NFC)"
                raise UsageError(what, f"compose those of the data, or {_UNTIE}")
            raise UsageError(what, _UNTIE)


def _normal(processor: Any) -> str:
    return repr(processor.tokenizer.normalizer)
