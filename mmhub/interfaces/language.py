"""Decoders that write text: causal language models, which read text as well, and sequence-to-sequence decoders.

Letters in shapes: B rows, N items, S raw positions, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
from torch import Tensor

from mmhub.batch import Bundle, Features, Items, Output
from mmhub.errors import UsageError
from mmhub.interfaces.config import ComponentConfig
from mmhub.interfaces.raw import Policy
from mmhub.interfaces.roles import Decoder, Processor, Stream


class Watermark(ComponentConfig, frozen=True):
    """A mark in the choice of words that who has the key finds again: SynthID (Dathathri et al., Nature 634, 2024).

    Whoever knows `key` can find the mark, forge it and remove it; "" is the value of the environment variable
    MMHUB_WATERMARK_KEY, which no checkpoint holds. Each token is drawn in a tournament of `depth` rounds, decided by
    the key and the `ngram` - 1 tokens before it.
    """

    key: str = ""
    depth: int = 30
    ngram: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= 64 or not 2 <= self.ngram <= 16:
            raise ValueError(f"depth must be 1 to 64 and ngram 2 to 16, got {self.depth} and {self.ngram}")


class Generation(ComponentConfig, frozen=True):
    """How a text is written, token by token.

    With `temperature = 0` each token is the most probable one; above, it is drawn, after `top_k` (0 = off), `top_p`
    (nucleus, Holtzman et al., arXiv:1904.09751) and `min_p` (Nguyen et al., arXiv:2407.01082) have left out improbable
    ones. With `beams` > 1 the best of so many hypotheses is kept instead, by log-probability / length **
    `length_penalty`. `repetition_penalty` divides the scores of tokens that stand in the text already (Keskar et al.,
    arXiv:1909.05858). Writing ends with an end token, with one of the texts in `stop`, or after `max_new_tokens`.
    `watermark` marks what is written; it takes tokens that are drawn.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    watermark: Watermark | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "length_penalty", "repetition_penalty"):
            if not math.isfinite(value := getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {value}")
        if self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError("max_new_tokens must be at least 1, and min_new_tokens between 0 and it")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (always the most probable token) or above, got {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError("top_k must be 0 (off) or above, top_p in (0, 1] and min_p in [0, 1]")
        if self.beams < 1 or (self.beams > 1 and self.temperature > 0):
            raise ValueError("beams must be at least 1, and more than 1 beam goes with temperature 0")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0 (1 = off), got {self.repetition_penalty}")
        if not all(self.stop):
            raise ValueError("a stop text must not be empty")
        if self.watermark and not self.temperature:
            raise ValueError("a watermark needs a temperature above 0: the most probable token leaves no choice")


@dataclass(frozen=True)
class Script:
    """A conversation as a language model reads it.

    Attributes:
        ids: of its text, (S,) long. weights: what predicting each of them counts in training, (S,) float.
        places: of each picture, sound and so on, in order, its modality and its place among ids and items together.
        prompt: how many ids stand before the last answer, all of them where there is none yet.
        turns: of a conversation with its answer, how many ids and items, together, each message takes up; they add up
            to all. What stands before the first message and after the last is part of these.
    """

    ids: Tensor
    weights: Tensor
    places: tuple[tuple[str, int], ...] = ()
    prompt: int = 0
    turns: tuple[int, ...] = ()


class LanguageProcessor(Processor):
    """A processor of texts that are written: it turns ids back into text, and frames documents and prompts.

    `read` gives a whole document: the begin token where there is one, the text, and the end token where `ends`.

    Attributes:
        begin_id: what stands before the first token of a text, None if the model knows nothing like it.
        end_id: what stands after the last one, None likewise. ends: do documents end with it?
        stop_ids: ids that end a generated text, `end_id` and, for chat models, the end of a turn.
        vocab_size: one more than the highest id. chat_template: how conversations are laid out, "" for none.
    """

    modality: ClassVar[str] = "text"
    begin_id: int | None
    end_id: int | None
    ends: bool
    stop_ids: tuple[int, ...]
    chat_template: str = ""

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @abstractmethod
    def prompt(self, raw: Any, policy: Policy) -> Tensor:
        """Return the ids of a text to go on with, (S,) long: as `read`, without the end token. May be empty."""

    @abstractmethod
    def chat(self, messages: Sequence[Mapping[str, Any]], policy: Policy) -> Tensor:
        """Return the ids of a conversation up to where the assistant's next answer begins, (S,) long.

        A message is {"role": "system" | "user" | "assistant", "content": text}.

        Raises:
            UsageError: there is no chat template. InputError: the conversation does not fit it.
        """

    def converse(self, messages: Sequence[Mapping[str, Any]], policy: Policy) -> Script:
        """Lay out a conversation in which media stand between texts, and say what of it is trained.

        A message is {"role", "content"[, "weight"]}; its content is a text or a list of parts, {"type": "text", "text"}
        or {"type": modality, ...}. What the assistant wrote is trained, with the weight of its message, the token that
        ends it included. A conversation that ends with a message of the user is laid out up to where the answer begins,
        and nothing of it is trained.

        Raises:
            UsageError: there is no chat template. InputError: the conversation does not fit it.
        """
        raise UsageError(f"{type(self).__name__} lays out no conversations with media", "take another decoder")

    def layout(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a conversation as it is laid out, without media; what a tokenizer is trained on."""
        raise UsageError(f"{type(self).__name__} lays out no conversations", "take another decoder")

    def take_template(self, name: str) -> None:
        """Take another chat template than its own: a built-in one's name, or a file."""
        raise UsageError(f"{type(self).__name__} takes no chat template", "take another decoder")

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""


class TextDecoder(Decoder):
    """A decoder that writes text token by token. Its own tokenizer is its `processor`.

    `forward` is for training and scoring; `begin`, `step` and `select` are for writing, with whatever the decoder keeps
    of the tokens before (keys and values, recurrent states) in a state of its own making.

    Attributes:
        processor: the tokenizer of what is written. context: tokens of one text it can handle, None for no limit.
        start: the id that a new text begins with where the decoder itself puts it there; it counts as repeated.
        limit: where some tokens may not follow others, a method that takes scores (R, V) and the ids written so far,
        (R, L), and returns the scores with those tokens at -inf.
    """

    processor: Any
    context: int | None = None
    start: int | None = None
    limit: Any = None

    @abstractmethod
    def __init__(self, config: Any, inputs: Mapping[str, Stream], processor: Any) -> None:
        """Build with fresh weights; `config.vocab_size` 0 means as many as the processor's."""
        super().__init__(config, inputs)
        self.processor = processor

    @property
    def generation(self) -> Generation:
        """How it writes where nothing else is said: the `generation` of its configuration, if it has that key."""
        return getattr(self.config, "generation", None) or Generation()

    @classmethod
    @abstractmethod
    def make_processor(cls, config: Any, tokenizer: Mapping[str, Any] | None = None) -> LanguageProcessor:
        """Build the processor; `tokenizer` is the recipe's `[model.tokenizer]` table, if any."""

    @classmethod
    @abstractmethod
    def load_processor(cls, config: Any, state: Mapping[str, Any], files: Mapping[str, bytes]) -> LanguageProcessor:
        """Rebuild a saved processor."""

    @abstractmethod
    def token_losses(self, bundle: Bundle, targets: Any = None) -> Tensor:
        """Return -log P of each target token given all before it, (B, T) fp32; 0 where there is none.

        For a language model, position t holds that of token t of the stream; a sequence-to-sequence decoder's T are the
        positions of `targets`.
        """

    @abstractmethod
    def begin(self, bundle: Bundle) -> tuple[Tensor, Any]:
        """Read what is given; return scores of the first token to write, (B, V) fp32 logits, and the state."""

    @abstractmethod
    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Take the token that was chosen for each row, (B,) long; return logits (B, V) of the next, and the state."""

    @abstractmethod
    def select(self, state: Any, rows: Tensor) -> Any:
        """Return the state of these rows, (R,) long, in this order; rows may repeat or be left out."""

    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        """Not for this kind of decoder: texts are written by `mmhub.generate`, which `Model.predict` calls."""
        raise NotImplementedError("texts are written by mmhub.generate")


class LanguageModel(TextDecoder):
    """A causal language model: it reads the text of a sample itself, embedded by `embed`, and writes on.

    The stream it reads (`fused`, else `text`) holds `ids`, -1 for what is no text, and `parts` where a row holds
    several texts behind each other: no text is ever attended from another one. A text's first token is not predicted,
    for nothing stands before it: processors put a begin token there.

    Attributes:
        dim: width of the embeddings. stateful: it passes on a state instead of attending to all tokens before, and is
        trained on consecutive pieces of long documents (truncated back-propagation through time). extends: it has
        `extend`, so that what a conversation began with is not read again at each turn.
    """

    reads_text: ClassVar[bool] = True
    stateful: ClassVar[bool] = False
    extends: bool = False
    tasks: ClassVar[tuple[str, ...]] = ("language-modelling", "chat", "captioning", "visual-question-answering")
    dim: int

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Look up ids (B, T), each at least 0, -> (B, T, D); any dropout of words or embeddings is part of it."""

    def token_count(self, positions: int) -> int:
        """As `Encoder.token_count`: every id is a token."""
        return positions

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        """A language model's targets are the texts themselves: see `count_targets`."""
        raise NotImplementedError("a language model has no target column")

    def count_targets(self, items: Items) -> Tensor:
        """Return how many tokens of each batch row are predicted, (B,); what `forward` takes as targets.

        Where the marks are what each token counts, their sum.
        """
        wanted = items.mask[:, 1:].long() if items.marks is None else items.mask[:, 1:] * items.marks[:, 1:]
        sums = wanted.sum(1)
        return sums.new_zeros(items.batch).index_add_(0, items.rows, sums)

    def weigh(self, targets: Any) -> Tensor | None:
        found: Tensor | None = targets
        return found

    @abstractmethod
    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        """With targets, return the mean -log P of all predicted tokens as the loss; else logits (B, V) after each row's
        last token.

        Where `continues` of the stream is given and `stateful` is set, the first part of each row goes on from the
        state that the same row of the batch before left, wherever `continues` is True; the new state is kept.
        """

    def extend(self, bundle: Bundle, state: Any) -> tuple[Tensor, Any]:
        """Read on from a state: a stream of T >= 1 more tokens of each row, without padding; return as `begin` does.

        The logits are those of `begin` on everything. The state that was given is not used again.
        """
        raise NotImplementedError(f"{type(self).__name__} reads everything anew")


def own_stream(bundle: Bundle) -> Features:
    """Return the stream a language model reads."""
    return bundle["fused"] if "fused" in bundle else bundle["text"]
