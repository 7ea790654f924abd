"""The multi-label head: any number of labels a sample, none included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.batch import Bundle, Output
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import ComponentConfig, Decoder, Stream
from mmhub.interfaces.labels import Labels, at_row, check_labels, is_missing, label_order, label_text
from mmhub_heads.summary import SummaryHead, check_head


class Multilabel(Decoder):
    """One independent yes-or-no decision a label; trained with the mean binary cross entropy."""

    tasks: ClassVar[tuple[str, ...]] = ("multilabel",)

    class Config(ComponentConfig, frozen=True):
        """Settings of the multi-label head.

        `labels` is learned from the training targets unless given. A label is answered when its probability reaches
        `threshold`. A target that is text is split at `separator`, and the parts are stripped of blanks.
        """

        labels: tuple[str, ...] = ()
        threshold: float = 0.5
        separator: str = ","
        dropout: float = 0.1
        hidden: int = 0

        def __post_init__(self) -> None:
            check_labels(self.labels)
            check_head(self.dropout, self.hidden)
            if not 0 < self.threshold < 1:
                raise ValueError(f"threshold must lie between 0 and 1, got {self.threshold}")
            if not self.separator:
                raise ValueError("separator must not be empty")

    reads = "summary"

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        if not config.labels:
            raise UsageError(
                "multi-label classification needs at least 1 label",
                "train on labelled data, or list them in model.decoder.config.labels",
            )
        self.labels = Labels(config.labels)
        self.head = SummaryHead(inputs, len(config.labels), dropout=config.dropout, hidden=config.hidden)

    @classmethod
    def fit(cls, config: Config, targets: Iterable[Any]) -> Config:
        """Return the config with the labels that occur, numbers in order of value; labels given before stay.

        Raises:
            InputError: a target is missing or cannot be a list of labels.
            UsageError: no label occurs.
        """
        if config.labels:
            return config
        found = {label for labels in _label_lists(targets, config.separator) for label in labels}
        if not found:
            raise UsageError(
                "the training targets hold no label at all",
                "check data.target, or list them in labels of the decoder's config",
            )
        return msgspec.structs.replace(config, labels=tuple(sorted(found, key=label_order)))

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        """Turn raw targets into (B, V) float, one where the label holds."""
        encoded = torch.zeros(len(targets), len(self.labels.names))
        for row, labels in enumerate(_label_lists(targets, self.config.separator)):
            try:
                for label in labels:
                    encoded[row, self.labels.number(label)] = 1.0
            except InputError as error:
                raise at_row(error, row) from None
        return encoded

    def soft_targets(self, targets: Tensor) -> Tensor:
        """Return (B, V) targets as they are: each is a probability of its own."""
        return targets

    def references(self, targets: Sequence[Any]) -> list[list[str]]:
        """Return the sorted labels of each row, as in the `labels` of an answer."""
        return [sorted(set(labels), key=label_order) for labels in _label_lists(targets, self.config.separator)]

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        """Return logits (B, V); the loss is the mean binary cross entropy with targets (B, V)."""
        logits = self.head(bundle)
        loss = None if targets is None else F.binary_cross_entropy_with_logits(logits, targets)
        return Output(logits=logits, loss=loss)

    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        """Answer `{"labels"}`, with every label's probability in `scores` if `details`."""
        answers: list[dict[str, Any]] = []
        for scores in output.logits.detach().float().sigmoid().tolist():
            pairs = dict(zip(self.labels.names, scores, strict=True))
            chosen = [label for label, score in pairs.items() if score >= self.config.threshold]
            answer: dict[str, Any] = {"labels": sorted(chosen, key=label_order)}
            if details:
                answer["scores"] = pairs
            answers.append(answer)
        return answers


def _label_lists(targets: Iterable[Any], separator: str) -> Iterable[list[str]]:
    """Yield the labels of each raw target in canonical form; an InputError carries its row."""
    for row, raw in enumerate(targets):
        try:
            yield _label_list(raw, separator)
        except InputError as error:
            raise at_row(error, row) from None


def _label_list(raw: Any, separator: str) -> list[str]:
    if isinstance(raw, str):  # the empty text is a row without labels
        return [part.strip() for part in raw.split(separator) if part.strip()]
    if hasattr(raw, "tolist"):  # a numpy array or tensor, as parquet readers give
        raw = raw.tolist()
    if is_missing(raw):
        raise InputError("the target is missing", "give an empty list for a row without labels")
    if isinstance(raw, (list, tuple, set, frozenset)):
        return [label_text(label) for label in raw]
    return [label_text(raw)]
