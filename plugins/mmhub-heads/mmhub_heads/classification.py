"""The classification head: one label a sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from torch import Tensor

from mmhub.batch import Bundle
from mmhub.errors import UsageError
from mmhub.interfaces import Classifier, ComponentConfig, Stream
from mmhub.interfaces.labels import check_labels, label_order, label_texts
from mmhub_heads.summary import SummaryHead, check_head


class Classification(Classifier):
    """Softmax over the labels seen in training; trained with the mean cross entropy of the rows."""

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

    reads = "summary"

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        if len(config.labels) < 2:
            raise UsageError(
                f"classification needs at least 2 labels, got {len(config.labels)}",
                "train on labelled data, or list them in model.decoder.config.labels",
            )
        self.smoothing = config.label_smoothing
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

    def logits(self, bundle: Bundle) -> Tensor:
        return self.head(bundle)
