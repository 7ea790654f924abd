"""The classification head: one label a sample."""

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
from mmhub_heads.labels import Labels, at_row, check_labels, label_order, label_text, label_texts
from mmhub_heads.summary import SummaryHead, check_head


class Classification(Decoder):
    """Softmax over the labels seen in training; trained with the mean cross entropy of the rows."""

    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    class Config(ComponentConfig, frozen=True):
        """Settings of the classification head.

        `labels` is learned from the training targets unless given; its order is the order of the classes.
        `label_smoothing` is that of Szegedy et al. 2016 (arXiv:1512.00567, section 7).
        """

        labels: tuple[str, ...] = ()
        label_smoothing: float = 0.0
        dropout: float = 0.1
        hidden: int = 0

        def __post_init__(self) -> None:
            check_labels(self.labels)
            check_head(self.dropout, self.hidden)
            if not 0 <= self.label_smoothing < 1:
                raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        if len(config.labels) < 2:
            raise UsageError(
                f"classification needs at least 2 labels, got {len(config.labels)}",
                "train on labelled data, or list them in model.decoder.config.labels",
            )
        self.labels = Labels(config.labels)
        self.head = SummaryHead(inputs, len(config.labels), dropout=config.dropout, hidden=config.hidden)

    @classmethod
    def fit(cls, config: Config, targets: Iterable[Any]) -> Config:
        """Return the config with the labels that occur, numbers in order of value; labels given before stay.

        Raises:
            InputError: a target is missing or cannot be a label.
            UsageError: fewer than two labels occur.
        """
        if config.labels:
            return config
        found = sorted(set(label_texts(targets)), key=label_order)
        if len(found) < 2:
            raise UsageError(
                f"the training targets hold {len(found)} distinct label(s){f': {found[0]!r}' if found else ''}, and "
                "classification needs at least 2",
                "check data.target, or list them in labels of the decoder's config",
            )
        return msgspec.structs.replace(config, labels=tuple(found))

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        """Turn raw labels into class numbers, (B,) long."""
        numbers = []
        for row, raw in enumerate(targets):
            try:
                numbers.append(self.labels.number(label_text(raw)))
            except InputError as error:
                raise at_row(error, row) from None
        return torch.tensor(numbers, dtype=torch.long)

    def references(self, targets: Sequence[Any]) -> list[str]:
        """Return the labels as text, as in the `label` of an answer."""
        return list(label_texts(targets))

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        """Return logits (B, V); the loss is the mean cross entropy with targets (B,)."""
        logits = self.head(bundle)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
        return Output(logits=logits, loss=loss)

    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        """Answer `{"label", "score"}`, with every label's probability in `scores` if `details`."""
        answers: list[dict[str, Any]] = []
        for scores in output.logits.detach().float().softmax(-1).tolist():
            best = max(range(len(scores)), key=scores.__getitem__)
            answer: dict[str, Any] = {"label": self.labels.names[best], "score": scores[best]}
            if details:
                answer["scores"] = dict(zip(self.labels.names, scores, strict=True))
            answers.append(answer)
        return answers
