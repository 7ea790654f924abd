"""The CTC head: speech to text by naming in each token of sound what is said there, or nothing.

Connectionist temporal classification, Graves et al. 2006: the loss sums over all ways to spread a transcript over the
tokens, so that training needs no times.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.batch import Bundle, Output
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import ComponentConfig, Decoder, Rate, Stream, Width, decode_config, encode_config
from mmhub.interfaces.labels import at_row
from mmhub_heads.ctc_align import align, time_words, without_prior
from mmhub_heads.ctc_library import blank_first, read_head, read_vocabulary
from mmhub_heads.ctc_search import Search, find_labels
from mmhub_heads.ctc_units import Kind, Units, learn
from mmhub_heads.summary import pick_stream

NOTHING = -1  # stands in targets behind a row's last label
UNKNOWN = -2  # stands for a transcript that the vocabulary cannot write
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Ctc(Decoder):
    """A linear layer over the tokens of an audio encoder, trained with the CTC loss."""

    tasks: ClassVar[tuple[str, ...]] = ("speech-recognition",)

    class Config(ComponentConfig, frozen=True):
        """Settings of the CTC head.

        `units` are what it writes: "character", "word" or "bpe", `vocab_size` byte pairs; `vocabulary` (and the
        `tokenizer` of byte pairs) is learned from the training transcripts unless given, in lower case unless
        `lowercase` is false (then in the case of the vocabulary's letters, where all have the same). `prior`: how much
        of each label's share in a recording is taken out of its probability when words are timed and, in training, in
        the loss, so that labels last as long as what they stand for.
        `search` is how a text is looked for. `tidy`: several blanks in a row are written as one.
        """

        units: Kind = "character"
        vocabulary: tuple[str, ...] = ()
        tokenizer: str = ""
        vocab_size: Width = 500
        lowercase: bool = True
        tidy: bool = True
        dropout: Rate = 0.1
        prior: Share = 0.3
        search: Search = Search()

        def __post_init__(self) -> None:
            if len(set(self.vocabulary)) < len(self.vocabulary):
                raise ValueError("vocabulary names a unit twice")

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        if not config.vocabulary:
            raise UsageError(
                "a CTC head needs a vocabulary, and its configuration has none",
                "train on transcripts, or list the units in model.decoder.config.vocabulary",
            )
        self.stream = "audio" if "audio" in inputs else pick_stream(inputs)
        self.seconds = inputs[self.stream].seconds
        self.units = Units(config.units, config.vocabulary, config.lowercase, config.tokenizer)
        self.drop = nn.Dropout(config.dropout)
        self.head = nn.Linear(inputs[self.stream].dim, len(self.units))
        self._warned = False  # was it said that a row does not fit its recording

    @classmethod
    def from_library(
        cls, config: Config, path: Path, inputs: Mapping[str, Stream], tokenizer: Mapping[str, Any] | None = None
    ) -> Self:
        """Build the head of a transformers folder, such as Wav2Vec2ForCTC's, with the vocabulary beside it.

        Raises:
            UsageError: it has none, or one of another width.
        """
        weight, bias = read_head(path)
        blank, vocabulary, lower = read_vocabulary(path, len(weight))
        known = {"units": "character", "vocabulary": vocabulary, "lowercase": lower, "tidy": False}  # as the library
        decoder = cls(msgspec.structs.replace(config, **known), inputs)
        if decoder.head.weight.shape != weight.shape:
            width = decoder.head.in_features
            raise UsageError(
                f"the head in '{path}' reads tokens of width {weight.shape[1]}, and they have {width}",
                "take the encoder from the same folder",
            )
        with torch.no_grad():
            decoder.head.weight.copy_(blank_first(weight, blank))
            decoder.head.bias.copy_(blank_first(bias, blank))
        return decoder

    @classmethod
    def fit(cls, config: Config, targets: Iterable[Any]) -> Config:
        """Return the config with the units that occur in training transcripts; a vocabulary given before stays.

        Raises:
            InputError: a transcript is missing or no text (`row` is set). UsageError: they are all empty.
        """
        if config.vocabulary:
            return config
        vocabulary, tokenizer = learn(config.units, targets, config.lowercase, config.vocab_size)
        if not vocabulary:
            raise UsageError("the training transcripts are empty", "check data.target")
        return msgspec.structs.replace(config, vocabulary=vocabulary, tokenizer=tokenizer)

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        """Turn transcripts into labels, (B, L) long, -1 behind a row's last."""
        rows = []
        for row, text in enumerate(self.references(targets)):
            try:
                rows.append(self.units.encode(text))
            except InputError as error:
                raise at_row(error, row) from None
        return _padded(rows)

    def encode_references(self, targets: Sequence[Any]) -> Tensor:
        """As `encode_targets`; a transcript with units outside the vocabulary gives no loss."""
        rows = []
        for text in self.references(targets):
            try:
                rows.append(self.units.encode(text))
            except InputError:
                rows.append([UNKNOWN])
        return _padded(rows)

    def weigh(self, targets: Tensor) -> Tensor:
        """Return the number of labels of each row, (B,): 1 for an empty transcript, 0 for one that has no loss."""
        return (targets != NOTHING).sum(1).clamp(min=1) * (targets[:, 0] != UNKNOWN)

    def references(self, targets: Sequence[Any]) -> list[str]:
        """Return the transcripts as `predict` would write them: one blank between words, in lower case if so set."""
        found = []
        for row, raw in enumerate(targets):
            try:
                found.append(self.units.normal(raw))
            except InputError as error:
                raise at_row(error, row) from None
        return found

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        """Return logits (B, T, V), fp32, whose label 0 is the blank, and the mean loss of the labels (B, L)."""
        features = bundle[self.stream]
        logits = self.head(self.drop(features.tokens)).float()
        loss = None if targets is None else self._loss(logits, features.mask, targets)
        return Output(logits=logits, loss=loss, mask=features.mask)

    def emissions(self, output: Output) -> list[Tensor]:
        """Return the log-probabilities of the labels in each row's real tokens, (T, V) fp32 on the CPU."""
        assert output.mask is not None
        log_probs = output.logits.detach().float().log_softmax(-1).cpu()
        return [row[:length] for row, length in zip(log_probs, output.mask.sum(1).tolist(), strict=True)]

    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        """Answer `{"text", "words", "score"}`, words as `{"word", "start", "end"}` in seconds.

        Words are left out without `details`, or where the encoder does not say what a token lasts. The score is the
        mean probability (geometric) of the labels in the tokens where they were heard.
        """
        return [self.answer(heard, details) for heard in self.emissions(output)]

    def answer(
        self, log_probs: Tensor, details: bool = True, search: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Answer log-probabilities (T, V), as `predict`; `search` changes keys of the configuration's."""
        how = self.config.search
        if search:
            how = decode_config(Search, encode_config(how) | dict(search), "search")
        labels = find_labels(log_probs, self.units, how)
        text = self.units.text(labels)
        answer: dict[str, Any] = {"text": " ".join(text.split()) if self.config.tidy else text}
        return answer | self._times(log_probs, labels) if details else answer

    def align(self, log_probs: Tensor, text: str) -> list[dict[str, Any]]:
        """Return when each word of a text was said, as `{"word", "start", "end"}`, given log-probabilities (T, V).

        Raises:
            InputError: the text has units that are not in the vocabulary, or more than the recording has tokens.
            UsageError: the encoder does not say what a token lasts.
        """
        if self.seconds is None:
            raise UsageError("this encoder does not say how long a token lasts", "use another audio encoder")
        found: list[dict[str, Any]] = self._times(log_probs, self.units.encode(text))["words"]
        return found

    def gaps(self, log_probs: Tensor) -> list[tuple[int, int]]:
        """Return where words can be parted in (T, V): behind the last token of one, and where the next begins."""
        path = log_probs.argmax(-1).tolist()
        found, end = [], 0
        for place, label in enumerate(path):
            if label and (not place or label != path[place - 1]) and self.units.begins_word(label):
                found.append((end, place))
            end = place + 1 if label else end
        return found

    def _times(self, log_probs: Tensor, labels: list[int]) -> dict[str, Any]:
        spans = align(log_probs, labels, self.config.prior)
        score = math.exp(sum(span.score for span in spans) / len(spans)) if spans else 1.0
        if self.seconds is None:
            return {"score": score}
        words = time_words(self.units, labels, spans, self.seconds, len(log_probs))
        return {"words": words, "score": score}

    def _loss(self, logits: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """The summed losses of the rows by the number of their labels.

        A row that is too short for its labels has a loss of 0, with a word, and its labels are still counted: what a
        row weighs is known before the encoder says how many tokens it has.
        """
        known, lengths, written = (targets >= 0).sum(1), mask.sum(1), targets[:, 0] != UNKNOWN
        same = (targets[:, 1:] == targets[:, :-1]) & (targets[:, 1:] != NOTHING)
        fits = (known + same.sum(1) <= lengths) & (lengths > 0)
        self._check_lengths(fits, known, lengths)
        losses = self._losses(logits.log_softmax(-1), mask, targets.clamp(min=0), torch.where(fits, known, 0))
        return torch.where(fits & written, losses, 0.0).sum() / self.weigh(targets).sum().clamp(min=1)

    def _losses(self, log_probs: Tensor, mask: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        """The loss of each row (B,). With priors that of CTC is what is reported, and theirs gives the gradient.

        A prior counts as much as a label of the row is recognised on average: from the start it would spread labels
        over sound that is not theirs yet. torch's gradient of `ctc_loss` is exp(input) - occupancy, which is right for
        log-softmax alone, for what is too much cancels there: of an input without priors it is taken off.
        """

        def losses(log_probs: Tensor) -> Tensor:
            lengths = mask.sum(1).clamp(min=1)
            return F.ctc_loss(log_probs.transpose(0, 1), labels, lengths, known, reduction="none")

        if not (self.training and self.config.prior):
            return losses(log_probs)
        plain = losses(log_probs.detach())
        recognised = (-plain / known.clamp(min=1)).exp()
        shifted = without_prior(log_probs, self.config.prior * recognised[:, None, None], mask)
        too_much = (shifted.detach().exp() * log_probs * mask.unsqueeze(-1)).sum((1, 2))
        moved = losses(shifted) - too_much
        return plain + moved - moved.detach()

    def _check_lengths(self, fits: Tensor, known: Tensor, lengths: Tensor) -> None:
        """Warn once of rows whose transcript has more labels than the recording has tokens."""
        if self._warned or torch.compiler.is_compiling():
            return
        good = fits.tolist()
        if all(good):
            return
        row = good.index(False)
        problem = f"a transcript has {int(known[row])} labels, and its recording {int(lengths[row])} tokens"
        hint = 'check the row, or use units = "bpe" or "word", or an encoder with a shorter hop'
        self._warned = True
        warnings.warn(f"{problem}, too few for them: from such rows nothing is learned; {hint}", stacklevel=2)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Stack labels, (B, L) long."""
    encoded = torch.full((len(rows), max([1, *map(len, rows)])), NOTHING)
    for row, numbers in enumerate(rows):
        encoded[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.long)
    return encoded
