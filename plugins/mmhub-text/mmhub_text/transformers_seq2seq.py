"""The decoder and head of any sequence-to-sequence model of the transformers library, on what an encoder read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import torch
from torch import Tensor, nn

from mmhub.batch import Bundle, Features, Output
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import ComponentConfig, Generation, Policy, Rate, Stream, TextDecoder
from mmhub.interfaces.labels import at_row
from mmhub_text.dictation import Dictation, Speech, read_speech
from mmhub_text.language_processor import LanguageTextProcessor
from mmhub_text.library import complete_table, describe_model, position_limit, read_description
from mmhub_text.logits import Head
from mmhub_text.past import copied, selected
from mmhub_text.targets import one_text
from mmhub_text.writers import (
    SEQ2SEQ,
    TRANSCRIBERS,
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
_BEAMS = 5  # where a folder of Whisper's names no number: so do its authors and the library's pipeline


class TransformersSeq2Seq(TextDecoder):
    """A transformers decoder that attends to the features of its own encoder, the only stream there is, or `fused`.

    Where it writes down speech, `dictation` says in which language and whether with times.

    In training the loss is smoothed by `label_smoothing`; in evaluation mode it is the plain mean -log P of a target
    token.
    """

    tasks: ClassVar[tuple[str, ...]] = ("translation", "speech-recognition")
    start: int

    class Config(ComponentConfig, frozen=True):
        """Settings of the decoder.

        `config` describes the whole model as it does for the `transformers` encoder. The rest follows, with `init`,
        from the folder, else from the tokenizer: writing starts after the token `start`; `forced_begin` is always the
        first that is written (a language), not scored; `lead` is what target texts begin with, `suppress` is never
        written, and `begin_suppress` not as the first token. `speech` is what a model of transcripts knows beside
        text, and `language` the code of the one that is spoken, where it knows several and is not to find out itself.
        """

        config: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it
        label_smoothing: Rate = 0.0
        start: int | None = None
        forced_begin: int | None = None
        lead: int | None = None
        suppress: tuple[int, ...] = ()
        begin_suppress: tuple[int, ...] = ()
        speech: Speech | None = None
        language: str = ""
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
        self.stream = _own_stream(inputs, described)
        self.hears = described.model_type in TRANSCRIBERS
        self.start, self.pad = start, next(iter(ids_of(described.pad_token_id)), 0)
        self.positions = position_limit(described)
        self._never: dict[tuple[torch.device, bool], Tensor] = {}  # what `limit` excludes, where it was asked to
        forced = () if config.forced_begin is None else (config.forced_begin,)
        dictation = None if config.speech is None else Dictation(self)
        self.given = forced if dictation is None else dictation.known
        self.context = self.positions if dictation is None else dictation.context
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
        speech = config.speech or read_speech(table, processor.tokenizer.get_vocab() if processor.tokenizer else {})
        if speech is not None and table.get("num_beams") is None:
            table["num_beams"] = _BEAMS
        config = msgspec.structs.replace(
            config,
            config=complete_table(described, SEQ2SEQ),
            start=_first(config.start, table.get("decoder_start_token_id")),
            forced_begin=_first(config.forced_begin, table.get("forced_bos_token_id")),
            lead=_first(config.lead, lead),
            suppress=config.suppress or _never(table),
            begin_suppress=config.begin_suppress or ids_of(table.get("begin_suppress_tokens")),
            speech=speech,
            language=config.language or (speech.language if speech is not None else ""),
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
        """Share the embeddings with the `transformers` encoder, where the library shares them. Of sound, have the
        encoder pass on the whole of its window, on which such a model was trained."""
        heard: Any = encoders.get("audio")
        if hasattr(heard, "fill_window"):
            heard.fill_window()
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
        """Turn texts into the ids to be written, the end included: (B, L) long, padded with -100.

        Of several texts for one row, it is the most frequent one that is trained on, or the first of these.
        """
        rows = [self._labels(target, row) for row, target in enumerate(targets)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)

    def encode_references(self, targets: Sequence[Any]) -> Tensor:
        """As `encode_targets`; where the language is found out by listening, there is no loss."""
        if self._detects:
            return torch.full((len(targets), 1), IGNORE)
        return self.encode_targets(targets)

    @property
    def _detects(self) -> bool:
        return self.config.speech is not None and Dictation(self).detects

    def _labels(self, target: Any, row: int) -> Tensor:
        if self._detects:
            raise UsageError("nothing says which language the targets are in", 'set `language` in config, e.g. "en"')
        try:
            ids = self.processor.prompt(one_text(target), Policy()).tolist()
            ids = ids[1:] if ids[:1] == [self.processor.begin_id] else ids
            lead = () if self.config.lead is None else (self.config.lead,)
            ids = [*(self.given or lead), *ids, self.processor.end_id]
            if self.positions is not None and len(ids) > self.positions:
                what = f"the target has {len(ids)} tokens, and the decoder has positions for {self.positions}"
                raise InputError(what, "cut the text, or leave the row out")
        except InputError as error:
            raise at_row(error, row) from None
        given = len(self.given)  # not chosen, so that nothing is to be learned from them; `_states` reads them
        return torch.tensor([IGNORE] * given + ids[given:], dtype=torch.long)

    def weigh(self, targets: Tensor) -> Tensor:
        """Return how many tokens each row is to write, (B,)."""
        return (targets != IGNORE).sum(1)

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        """With targets (B, L), return the mean loss of their tokens and no logits; else logits (B, V) of the first."""
        if targets is None:
            return Output(logits=self.begin(bundle)[0])
        states = self._states(bundle[self.stream], targets)
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss = self.head.mean_loss(self.model, states, targets, smoothing)
        return Output(logits=states.new_zeros(len(targets), 0), loss=loss, mask=targets != IGNORE)

    def token_losses(self, bundle: Bundle, targets: Tensor | None = None) -> Tensor:
        """Return -log P of each target token given those before it, (B, L) fp32; 0 at padding."""
        if targets is None:
            raise ValueError("a sequence-to-sequence decoder scores targets")
        return self.head.losses(self.model, self._states(bundle[self.stream], targets), targets)

    def all_logits(self, bundle: Bundle, ids: Tensor) -> Tensor:
        """Return the logits after each of the ids (B, L) that are written so far, the start included: (B, L, V).

        They are held all at once: for graphs that other programs run.
        """
        source = bundle[self.stream]
        return self.head(self.model, self._run(ids, source.tokens, source.mask).last_hidden_state).float()

    def _states(self, source: Features, targets: Tensor) -> Tensor:
        """The last states of the decoder that has read the targets before each, (B, L, D)."""
        before = torch.cat((targets.new_full((len(targets), 1), self.start), targets[:, :-1]), 1)
        for place, token in enumerate(self.given, 1):
            before[:, place : place + 1] = token
        return self._run(before.masked_fill(before == IGNORE, self.pad), source.tokens, source.mask).last_hidden_state

    def _run(self, ids: Tensor, tokens: Tensor, mask: Tensor, past: Any = None, keep: bool = False) -> Any:
        masked = {} if self.hears else {"encoder_attention_mask": mask.long()}  # those see whole windows
        return self.model.get_decoder()(
            input_ids=ids, encoder_hidden_states=tokens, past_key_values=past, use_cache=keep, **masked
        )

    # -- writing ------------------------------------------------------------------------------------------------

    def dictation(self, *, language: str = "", translate: bool = False, times: bool = False) -> Dictation:
        """Return this decoder set to write down speech in a language, or to translate it, with or without times.

        Raises:
            UsageError: the model is not for speech, or knows no such language.
        """
        if self.config.speech is None:
            what = f"a {self.config.config['model_type']} decoder has no tokens for languages and times"
            raise UsageError(what, "leave language, translate and timestamps out")
        return Dictation(self, language, translate, times)

    def begin(self, bundle: Bundle) -> tuple[Tensor, Any]:
        if self.config.speech is not None:
            return Dictation(self).begin(bundle)
        state = self.opened(bundle)
        logits, state = self.go_on(torch.full((len(state.mask), 1), self.start, device=state.mask.device), state)
        if self.config.forced_begin is not None:
            logits = torch.full_like(logits, -torch.inf)
            logits[:, self.config.forced_begin] = 0
        return logits, state

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.go_on(ids[:, None], replace(state, past=copied(state.past)))

    def select(self, state: Any, rows: Tensor) -> Any:
        owners = state.owners[rows]
        if torch.equal(owners, state.owners):  # beams of the same rows: what they attend to stays as it is
            return replace(state, past=selected(state.past, rows, crossed=False))
        past = selected(state.past, rows)
        return _State(past, state.tokens[rows], state.mask[rows], owners)

    def limit(self, scores: Tensor, written: Tensor) -> Tensor:
        """Return the scores (R, V), with -inf for tokens that may not follow the ids written so far, (R, L)."""
        key = scores.device, written.shape[1] == 0
        if key not in self._never:
            ids = [*self.config.suppress, *(self.config.begin_suppress if key[1] else ())]
            self._never[key] = torch.tensor(ids, dtype=torch.long, device=scores.device)
        return scores.index_fill(1, self._never[key], -torch.inf) if len(self._never[key]) else scores

    def opened(self, bundle: Bundle) -> _State:
        """Return the state before the first token."""
        source = bundle[self.stream]
        return _State(None, source.tokens, source.mask, torch.arange(len(source.mask), device=source.mask.device))

    def go_on(self, ids: Tensor, state: _State) -> tuple[Tensor, _State]:
        """Read ids (B, L); return the logits (B, V) of the next, and the state."""
        output = self._run(ids, state.tokens, state.mask, state.past, keep=True)
        logits = self.head(self.model, output.last_hidden_state[:, -1]).float()
        # once its keys and values are known nothing reads the source itself, but that there is one
        tokens = state.tokens[:, :1] if self.hears else state.tokens
        return logits, replace(state, past=output.past_key_values, tokens=tokens)


@dataclass(frozen=True)
class _State:
    """Keys and values so far, and what is attended to: tokens (B, T, D), mask (B, T), of the rows `owners` (B,)."""

    past: Any
    tokens: Tensor
    mask: Tensor
    owners: Tensor


def _own_stream(inputs: Mapping[str, Stream], described: Any) -> str:
    """The name of the stream to read."""
    name = "fused" if "fused" in inputs else next(iter(inputs), "")
    if (len(inputs) != 1 and name != "fused") or inputs[name].dim != described.hidden_size:
        raise UsageError(
            f"a {described.model_type} decoder reads the {described.hidden_size} features of its own encoder",
            'join it to that encoder alone, with the fusion "streams"',
        )
    return name


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
