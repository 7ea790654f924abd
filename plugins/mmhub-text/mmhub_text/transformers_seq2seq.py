"""The decoder and head of any sequence-to-sequence model of the transformers library, on what an encoder read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import torch
from torch import Tensor, nn

from mmhub.batch import Bundle, Features, Output
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import ComponentConfig, Generation, Policy, Rate, Stream, TextDecoder, describe_raw
from mmhub.interfaces.labels import at_row
from mmhub_text.language_processor import LanguageTextProcessor
from mmhub_text.library import complete_table, describe_model, position_limit, read_description
from mmhub_text.logits import Head
from mmhub_text.past import copied, selected
from mmhub_text.writers import (
    SEQ2SEQ,
    arranged,
    build_writer,
    check_vocabulary,
    complete_vocabulary,
    generation_table,
    ids_of,
    load_writer,
    read_generation,
    read_processor,
)

IGNORE = -100  # the label of padding


class TransformersSeq2Seq(TextDecoder):
    """A transformers decoder that attends to the features of its own encoder, the stream `text`.

    In training the loss is smoothed by `label_smoothing`; in evaluation mode it is the plain mean -log P of a target
    token.
    """

    tasks: ClassVar[tuple[str, ...]] = ("translation",)
    needs: ClassVar[tuple[str, ...]] = ("text",)
    start: int

    class Config(ComponentConfig, frozen=True):
        """Settings of the decoder.

        `config` describes the whole model as it does for the `transformers` encoder. The rest follows, with `init`,
        from the folder, else from the tokenizer: writing starts after the token `start`; `forced_begin` is always the
        first that is written (a language), not scored; `lead` is what target texts begin with, and `suppress` is never
        written.
        """

        config: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it
        label_smoothing: Rate = 0.0
        start: int | None = None
        forced_begin: int | None = None
        lead: int | None = None
        suppress: tuple[int, ...] = ()
        generation: Generation | None = None

        @classmethod
        def arrange(cls, table: dict[str, Any]) -> dict[str, Any]:
            """Take `model_type` and the hyper-parameters beside our own keys as well as in a `config` of their own."""
            return arranged(cls, table)

    def __init__(self, config: Config, inputs: Mapping[str, Stream], processor: LanguageTextProcessor) -> None:
        described = describe_model(complete_vocabulary(config.config, processor, SEQ2SEQ), SEQ2SEQ)
        check_vocabulary(described, processor)
        start = next((one for one in (config.start, *_starts(described, processor)) if one is not None), None)
        if start is None or processor.end_id is None:
            what = "the end token" if processor.end_id is None else "the token that writing starts after"
            raise UsageError(f"nothing says which is {what}", "set `start` in config, or take another tokenizer")
        for name, one in (("start", start), ("forced_begin", config.forced_begin)):
            if one is not None and not 0 <= one < described.vocab_size:
                what = f"{name} is token {one}, and the model knows {described.vocab_size} tokens"
                raise UsageError(what, f"set `{name}` in config to an id of the tokenizer")
        table = complete_table(described, SEQ2SEQ)
        super().__init__(msgspec.structs.replace(config, config=table, start=start), inputs, processor)
        _check_width(inputs, described)
        self.start, self.pad = start, next(iter(ids_of(described.pad_token_id)), 0)
        self.context = position_limit(described)
        self.head = Head()
        self._take(build_writer(described, SEQ2SEQ))

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
        described = read_description(path, config.config, SEQ2SEQ)
        processor, lead = read_processor(path, described, tokenizer)
        table = generation_table(path)
        config = msgspec.structs.replace(
            config,
            config=complete_table(described, SEQ2SEQ),
            start=_first(config.start, table.get("decoder_start_token_id")),
            forced_begin=_first(config.forced_begin, table.get("forced_bos_token_id")),
            lead=_first(config.lead, lead),
            suppress=config.suppress or _never(table),
            generation=config.generation or read_generation(table, whole_length=True),
        )
        with torch.device("meta"):  # the loaded model takes this one's place
            decoder = cls(config, inputs, processor)
        decoder._take(load_writer(described, path, SEQ2SEQ))
        return decoder

    def _take(self, model: Any) -> None:
        """Keep a whole model without its encoder, which is a part of its own here."""
        encoder, decoder = model.get_encoder(), model.get_decoder()
        self.shares = encoder.get_input_embeddings().weight is decoder.get_input_embeddings().weight
        for module in list(model.modules()):
            for name, child in module.named_children():
                if child is encoder:
                    setattr(module, name, nn.Module())
        self.model = model

    def tie(self, encoders: Mapping[str, Any]) -> None:
        """Share the embeddings with the `transformers` encoder, where the library shares them."""
        encoder, ours = encoders.get("text"), self.model.get_decoder().get_input_embeddings().weight
        theirs: Any = getattr(encoder, "model", None)
        if not self.shares or encoder is None or not hasattr(theirs, "get_input_embeddings"):
            return
        old = theirs.get_input_embeddings().weight
        if old.shape == ours.shape and _same_tokens(encoder.processor, self.processor):
            for module in theirs.modules():
                if isinstance(module, nn.Embedding) and module.weight is old:
                    module.weight = ours

    # -- training and scoring -----------------------------------------------------------------------------------

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        """Turn texts into the ids to be written, the end included: (B, L) long, padded with -100."""
        rows = [self._labels(target, row) for row, target in enumerate(targets)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)

    def _labels(self, target: Any, row: int) -> Tensor:
        try:
            if not isinstance(target, str):
                raise InputError(f"the target is {describe_raw(target)}, not a text", "give every row a target text")
            ids = self.processor.prompt(target, Policy()).tolist()
            ids = ids[1:] if ids[:1] == [self.processor.begin_id] else ids
            lead = _first(self.config.forced_begin, self.config.lead)
            ids = [*([] if lead is None else [lead]), *ids, self.processor.end_id]
            if self.context is not None and len(ids) > self.context:
                what = f"the target has {len(ids)} tokens, and the decoder has positions for {self.context}"
                raise InputError(what, "cut the text, or leave the row out")
        except InputError as error:
            raise at_row(error, row) from None
        if self.config.forced_begin is not None:
            ids[0] = IGNORE  # it is not chosen, so that nothing is to be learned from it; `_states` reads it
        return torch.tensor(ids, dtype=torch.long)

    def weigh(self, targets: Tensor) -> Tensor:
        """Return how many tokens each row is to write, (B,)."""
        return (targets != IGNORE).sum(1)

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        """With targets (B, L), return the mean loss of their tokens and no logits; else logits (B, V) of the first."""
        if targets is None:
            return Output(logits=self.begin(bundle)[0])
        states = self._states(bundle["text"], targets)
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss = self.head.mean_loss(self.model, states, targets, smoothing)
        return Output(logits=states.new_zeros(len(targets), 0), loss=loss, mask=targets != IGNORE)

    def token_losses(self, bundle: Bundle, targets: Tensor | None = None) -> Tensor:
        """Return -log P of each target token given those before it, (B, L) fp32; 0 at padding."""
        if targets is None:
            raise ValueError("a sequence-to-sequence decoder scores targets")
        return self.head.losses(self.model, self._states(bundle["text"], targets), targets)

    def _states(self, source: Features, targets: Tensor) -> Tensor:
        """The last states of the decoder that has read the targets before each, (B, L, D)."""
        before = torch.cat((targets.new_full((len(targets), 1), self.start), targets[:, :-1]), 1)
        if self.config.forced_begin is not None:
            before[:, 1:2] = self.config.forced_begin
        return self._run(before.masked_fill(before == IGNORE, self.pad), source.tokens, source.mask).last_hidden_state

    def _run(self, ids: Tensor, tokens: Tensor, mask: Tensor, past: Any = None, keep: bool = False) -> Any:
        return self.model.get_decoder()(
            input_ids=ids,
            encoder_hidden_states=tokens,
            encoder_attention_mask=mask.long(),
            past_key_values=past,
            use_cache=keep,
        )

    # -- writing ------------------------------------------------------------------------------------------------

    def begin(self, bundle: Bundle) -> tuple[Tensor, Any]:
        source = bundle["text"]
        ids = torch.full((len(source.mask),), self.start, device=source.mask.device)
        logits, state = self._go_on(ids, _State(None, source.tokens, source.mask))
        if self.config.forced_begin is not None:
            logits = torch.full_like(logits, -torch.inf)
            logits[:, self.config.forced_begin] = 0
        return logits, state

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self._go_on(ids, _State(copied(state.past), state.tokens, state.mask))

    def select(self, state: Any, rows: Tensor) -> Any:
        return _State(selected(state.past, rows), state.tokens[rows], state.mask[rows])

    def _go_on(self, ids: Tensor, state: _State) -> tuple[Tensor, _State]:
        output = self._run(ids[:, None], state.tokens, state.mask, state.past, keep=True)
        logits = self.head(self.model, output.last_hidden_state[:, -1]).float()
        if self.config.suppress:
            logits[:, list(self.config.suppress)] = -torch.inf
        return logits, _State(output.past_key_values, state.tokens, state.mask)


@dataclass(frozen=True)
class _State:
    """Keys and values so far, and what is attended to: tokens (B, T, D), mask (B, T)."""

    past: Any
    tokens: Tensor
    mask: Tensor


def _check_width(inputs: Mapping[str, Stream], described: Any) -> None:
    if "text" not in inputs or inputs["text"].dim != described.hidden_size:
        raise UsageError(
            f"a {described.model_type} decoder reads the {described.hidden_size} features of its own encoder",
            'join it to that encoder alone, with the fusion "streams"',
        )


def _starts(described: Any, processor: Any) -> tuple[int | None, ...]:
    return (getattr(described, "decoder_start_token_id", None), processor.begin_id, described.pad_token_id)


def _first(*values: Any) -> int | None:
    """The first of the values that is an id."""
    return next((one for value in values for one in ids_of(value)), None)


def _never(table: Mapping[str, Any]) -> tuple[int, ...]:
    """Single tokens that the library's generation settings exclude."""
    words = table.get("bad_words_ids") or []
    alone = (word[0] for word in words if isinstance(word, list) and len(word) == 1)
    return tuple(dict.fromkeys((*ids_of(list(alone)), *ids_of(table.get("suppress_tokens")))))


def _same_tokens(first: Any, second: Any) -> bool:
    """Do two processors know the same tokens by the same ids? How the special ones are called may differ."""
    tables = [processor.tokenizer.get_vocab() for processor in (first, second)]
    names = {f"{a}{name}{b}" for name in ("pad", "unk", "s", "/s", "PAD", "UNK", "CLS", "SEP") for a, b in ("<>", "[]")}
    plain = [{token: i for token, i in table.items() if token not in names} for table in tables]
    return plain[0] == plain[1]
