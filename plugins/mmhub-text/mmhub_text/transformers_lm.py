"""Any causal language model of the transformers library, with the weights of a transformers folder or fresh ones."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import torch
from torch import Tensor

from mmhub.batch import Bundle, Features, Output
from mmhub.errors import UsageError
from mmhub.interfaces import ComponentConfig, Generation, LanguageModel, Stream, own_stream
from mmhub_text.language_processor import LanguageTextProcessor
from mmhub_text.library import complete_table, describe_model, position_limit, read_description
from mmhub_text.logits import Head
from mmhub_text.past import copied, is_plain, selected
from mmhub_text.writers import (
    LANGUAGE_MODELS,
    arranged,
    build_writer,
    check_causal,
    check_vocabulary,
    complete_vocabulary,
    generation_table,
    load_writer,
    read_generation,
    read_processor,
)

# Texts one after the other in a row are kept apart by positions that start again; held by a test for each.
PACKED = {
    *("apertus", "arcee", "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2"),
    *("gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite", "helium", "llama", "ministral", "mistral", "mixtral"),
    *("nemotron", "olmo", "olmo2", "olmo3", "persimmon", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"),
    *("stablelm", "starcoder2"),
}
# Padding on the left, with a mask, changes no real token while keys and values are kept, and several tokens at once can
# be read behind those; held by a test for each.
LEFT_PADDED = PACKED | {"biogpt", "bloom", "falcon", "mpt", "opt", "xglm"}


class TransformersLM(LanguageModel):
    """A transformers model with its own language modelling head."""

    modality: ClassVar[str] = "text"  # as an encoder's, in whose place it is written in the library's layout

    class Config(ComponentConfig, frozen=True):
        """Settings of the model.

        `config` holds `model_type` and hyper-parameters under transformers' own names; with `init` it changes those of
        the folder, for example the dropout. `max_length` lowers the number of tokens a text may have from the model's
        own limit. `generation` is how it writes where nothing else is said; with `init`, what the folder's
        generation_config.json says.
        """

        config: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it
        max_length: int | None = None
        generation: Generation | None = None

        @classmethod
        def arrange(cls, table: dict[str, Any]) -> dict[str, Any]:
            """Take `model_type` and the hyper-parameters beside our own keys as well as in a `config` of their own."""
            return arranged(cls, table)

        def __post_init__(self) -> None:
            if self.max_length is not None and self.max_length < 2:
                raise ValueError(f"max_length must be at least 2, got {self.max_length}")

    def __init__(self, config: Config, inputs: Mapping[str, Stream], processor: LanguageTextProcessor) -> None:
        table = complete_vocabulary(config.config, processor, LANGUAGE_MODELS)
        described = describe_model(table, LANGUAGE_MODELS)
        check_causal(described)
        check_vocabulary(described, processor)
        table = complete_table(described, LANGUAGE_MODELS)
        super().__init__(msgspec.structs.replace(config, config=table), inputs, processor)
        self.context = _context(config.max_length, described)
        self.kind = str(described.model_type)
        self.extends = self.kind in LEFT_PADDED
        self.model: Any = build_writer(described, LANGUAGE_MODELS)
        self.dim = int(self.model.get_input_embeddings().embedding_dim)
        self.head = Head()

    @classmethod
    def make_processor(cls, config: Config, tokenizer: Mapping[str, Any] | None = None) -> LanguageTextProcessor:
        return LanguageTextProcessor.from_recipe(tokenizer, default="bpe")

    @classmethod
    def load_processor(
        cls, config: Config, state: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> LanguageTextProcessor:
        return LanguageTextProcessor.from_state(state, files)

    @classmethod
    def from_library(
        cls,
        config: Config,
        path: Path,
        inputs: Mapping[str, Stream],
        tokenizer: Mapping[str, Any] | None = None,
    ) -> Self:
        """Read a transformers folder: JSON, tokenizer files and safetensors only."""
        described = read_description(path, config.config, LANGUAGE_MODELS)
        processor, _ = read_processor(path, described, tokenizer)
        generation = config.generation or read_generation(generation_table(path))
        table = complete_table(described, LANGUAGE_MODELS)
        config = msgspec.structs.replace(config, config=table, generation=generation)
        with torch.device("meta"):  # the loaded model takes this one's place
            decoder = cls(config, inputs, processor)
        decoder.model = load_writer(described, path, LANGUAGE_MODELS)
        return decoder

    def embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        return embedded

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        stream = own_stream(bundle)
        states = self._states(stream)
        if targets is None:
            return Output(logits=self.head(self.model, _last(states, stream.lengths)).float())
        counts = None if stream.loss is None or stream.loss.dtype == torch.bool else stream.loss[:, 1:]
        loss = self.head.mean_loss(self.model, states[:, :-1], _predicted(stream), weights=counts)
        return Output(logits=states.new_zeros(len(states), 0), loss=loss)

    def all_logits(self, bundle: Bundle) -> Tensor:
        """Return the logits after every token of rows that are one text each, (B, T, V); after padding they are noise.

        They are held all at once: for graphs that other programs run.
        """
        return self.head(self.model, self._states(own_stream(bundle))).float()

    def token_losses(self, bundle: Bundle, targets: Any = None) -> Tensor:
        stream = own_stream(bundle)
        losses = self.head.losses(self.model, self._states(stream)[:, :-1], _predicted(stream))
        return torch.nn.functional.pad(losses, (1, 0))

    # -- reading ------------------------------------------------------------------------------------------------

    def _states(self, stream: Features) -> Tensor:
        """The last hidden states of every token, (B, T, H), that of a text's token given only those before it."""
        tokens, mask = stream.tokens, stream.mask
        if stream.parts is None:
            return self._run(tokens, attention_mask=mask.long())
        first = _first_of_part(stream)
        if self.kind in PACKED:  # the library sees from the positions where another text begins
            place = torch.arange(mask.shape[1], device=mask.device)
            return self._run(tokens, position_ids=place - torch.where(first, place, 0).cummax(1).values)
        number = (first & mask).flatten().cumsum(0)[mask.flatten()] - 1
        place = _place(number)
        lone = tokens.new_zeros(int(number[-1]) + 1, int(place.max()) + 1, tokens.shape[2])
        lone = lone.index_put((number, place), tokens[mask])
        real = torch.zeros(lone.shape[:2], dtype=torch.bool, device=mask.device)
        real[number, place] = True
        found = self._run(lone, attention_mask=real.long())
        return found.new_zeros(*mask.shape, found.shape[2]).index_put((mask,), found[number, place])

    def _run(self, tokens: Tensor, **more: Any) -> Tensor:
        tokens = tokens if self.kind in LEFT_PADDED else tokens.clone()  # CTRL scales them in place
        states: Tensor = self.model.base_model(inputs_embeds=tokens, use_cache=False, **more).last_hidden_state
        return states

    # -- writing ------------------------------------------------------------------------------------------------

    def begin(self, bundle: Bundle) -> tuple[Tensor, Any]:
        stream = own_stream(bundle)
        lengths, width = stream.lengths, stream.mask.shape[1]
        uneven = bool((lengths != width).any())
        keeps = "past_key_values" in _arguments(type(self.model.base_model).forward)
        if keeps and (not uneven or self.kind in LEFT_PADDED):
            shift = (torch.arange(width, device=lengths.device) - (width - lengths)[:, None]) % width
            tokens = stream.tokens.gather(1, shift[..., None].expand_as(stream.tokens)) if uneven else stream.tokens
            mask = stream.mask.flip(1) if uneven else None
            past = _Cached(None, mask, lengths)
            logits, past = self._go_on({"inputs_embeds": tokens}, past)
            if is_plain(past.past):
                return logits, past
        whole = _Whole(stream.tokens, lengths)
        return self._again(whole), whole

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        if isinstance(state, _Whole):
            state = state.longer(self.embed(ids[:, None]))
            return self._again(state), state
        mask = None if state.mask is None else torch.nn.functional.pad(state.mask, (0, 1), value=True)
        state = _Cached(copied(state.past), mask, state.lengths + 1)
        return self._go_on({"input_ids": ids[:, None]}, state)

    def extend(self, bundle: Bundle, state: Any) -> tuple[Tensor, Any]:
        tokens = own_stream(bundle).tokens
        width = tokens.shape[1]
        if isinstance(state, _Whole):
            for column in tokens.unbind(1):
                state = state.longer(column[:, None])
            return self._again(state), state
        mask = None if state.mask is None else torch.nn.functional.pad(state.mask, (0, width), value=True)
        return self._go_on({"inputs_embeds": tokens}, _Cached(copied(state.past), mask, state.lengths + width))

    def select(self, state: Any, rows: Tensor) -> Any:
        return state.select(rows)

    def _go_on(self, given: dict[str, Tensor], state: _Cached) -> tuple[Tensor, _Cached]:
        """Run the newest tokens, of which the last column is real in every row."""
        more: dict[str, Any] = {}
        if state.mask is not None:
            more["attention_mask"] = state.mask.long()
            if "position_ids" in _arguments(type(self.model.base_model).forward):
                width = next(iter(given.values())).shape[1]
                more["position_ids"] = (state.mask.long().cumsum(1) - 1).clamp(min=0)[:, -width:]
        output = self.model.base_model(**given, **more, past_key_values=state.past, use_cache=True)
        past = getattr(output, "past_key_values", None)
        logits = self.head(self.model, output.last_hidden_state[:, -1]).float()
        return logits, _Cached(past, state.mask, state.lengths)

    def _again(self, state: _Whole) -> Tensor:
        """Run all tokens from the first one, for models whose memory is not keys and values alone."""
        width = state.tokens.shape[1]
        mask = torch.arange(width, device=state.lengths.device) < state.lengths[:, None]
        states = self._run(state.tokens, attention_mask=mask.long())
        return self.head(self.model, _last(states, state.lengths)).float()


@dataclass(frozen=True)
class _Cached:
    """Keys and values so far; rows are padded on the left where `mask` (B, S) is False."""

    past: Any
    mask: Tensor | None
    lengths: Tensor

    def select(self, rows: Tensor) -> _Cached:
        mask = None if self.mask is None else self.mask[rows]
        return _Cached(selected(self.past, rows), mask, self.lengths[rows])


@dataclass(frozen=True)
class _Whole:
    """All tokens so far, (B, T, D), padded on the right."""

    tokens: Tensor
    lengths: Tensor

    def select(self, rows: Tensor) -> _Whole:
        return _Whole(self.tokens[rows], self.lengths[rows])

    def longer(self, token: Tensor) -> _Whole:
        tokens = torch.nn.functional.pad(self.tokens, (0, 0, 0, 1))
        where = self.lengths[:, None, None].expand(-1, 1, tokens.shape[2])
        return _Whole(tokens.scatter(1, where, token.to(tokens.dtype)), self.lengths + 1)


def _first_of_part(stream: Features) -> Tensor:
    """Where a text of a row begins, (B, T) bool; padding counts as one of its own."""
    assert stream.parts is not None
    parts = stream.parts.masked_fill(~stream.mask, -1)
    first = torch.ones_like(stream.mask)
    first[:, 1:] = parts[:, 1:] != parts[:, :-1]
    return first


def _place(number: Tensor) -> Tensor:
    """The position of each element in its run of equal, ascending numbers 0, 1, ..."""
    counts = torch.bincount(number)
    return torch.arange(len(number), device=number.device) - (counts.cumsum(0) - counts)[number]


def _predicted(stream: Features) -> Tensor:
    """The id that each token but the last predicts, (B, T - 1) long, -100 for none."""
    assert stream.ids is not None
    wanted = stream.mask[:, 1:] & stream.mask[:, :-1] & (stream.ids[:, 1:] >= 0)
    if stream.parts is not None:
        wanted = wanted & (stream.parts[:, 1:] == stream.parts[:, :-1])
    if stream.loss is not None:
        wanted = wanted & (stream.loss[:, 1:] > 0)
    return torch.where(wanted, stream.ids[:, 1:], -100)


def _last(states: Tensor, lengths: Tensor) -> Tensor:
    """The state of each row's last real token, (B, H)."""
    return states[torch.arange(len(states), device=states.device), (lengths - 1).clamp(min=0)]


@functools.cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _context(wanted: int | None, described: Any) -> int | None:
    limit = position_limit(described)
    if wanted is not None and limit is not None and wanted > limit:
        what = f"max_length {wanted} is more than the {limit} tokens this {described.model_type} has positions for"
        raise UsageError(what, "lower max_length")
    return wanted or limit
