"""The classification head: one label a sample."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec
from torch import Tensor

from mmhub.batch import Bundle
from mmhub.errors import UsageError, did_you_mean
from mmhub.interfaces import Classifier, ComponentConfig, Stream
from mmhub.interfaces.labels import check_labels, label_order, label_texts
from mmhub_heads.calibration import Calibrated, check_temperature
from mmhub_heads.summary import SummaryHead, check_head

BALANCED = "balanced"


class Classification(Calibrated, Classifier):
    """Softmax over the labels seen in training; trained with the mean cross entropy of the rows."""

    class Config(ComponentConfig, frozen=True):
        """Settings of the classification head.

        `labels` is learned from the training targets unless given; its order is the order of the classes.
        `label_smoothing` is that of Szegedy et al. 2016 (arXiv:1512.00567, section 7). `class_weights` says what a row
        of each label counts in the loss, 1 where it names none; "balanced" becomes rows / (labels * rows of the label),
        so that all labels count the same. With `calibrate`, `temperature` is found on the validation rows after
        training.
        """

        labels: tuple[str, ...] = ()
        label_smoothing: float = 0.0
        class_weights: Literal["balanced"] | dict[str, float] | None = None
        dropout: float = 0.1
        hidden: int = 0
        calibrate: bool = False
        temperature: float = 1.0

        def __post_init__(self) -> None:
            check_labels(self.labels)
            check_head(self.dropout, self.hidden)
            check_temperature(self.temperature)
            if not 0 <= self.label_smoothing < 1:
                raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")
            for label, weight in self.class_weights.items() if isinstance(self.class_weights, dict) else ():
                if not 0 < weight < math.inf:
                    raise ValueError(f"the weight of the label {label!r} must be above 0, got {weight}")

    reads = "summary"

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        if len(config.labels) < 2:
            raise UsageError(
                f"classification needs at least 2 labels, got {len(config.labels)}",
                "train on labelled data, or list them in model.decoder.config.labels",
            )
        self.smoothing = config.label_smoothing
        self.temperature = config.temperature
        self.weights = _weights(config)
        self.head = SummaryHead(inputs, len(config.labels), dropout=config.dropout, hidden=config.hidden)

    @classmethod
    def fit(cls, config: Config, targets: Iterable[Any]) -> Config:
        """Return the config with the labels that occur, numbers in order of value, and their balanced weights.

        What is given before stays.

        Raises:
            InputError: a target is missing or cannot be a label.
            UsageError: fewer than two labels occur.
        """
        if config.labels and config.class_weights != BALANCED:
            return config
        counts = Counter(label_texts(targets))
        found = config.labels or tuple(sorted(counts, key=label_order))
        if len(found) < 2:
            raise UsageError(
                f"the training targets hold {len(found)} distinct label(s){f': {found[0]!r}' if found else ''}, and "
                "classification needs at least 2",
                "check data.target, or list them in labels of the decoder's config",
            )
        weights = config.class_weights
        if weights == BALANCED:
            share = counts.total() / len(found)
            weights = {label: share / counts[label] if counts[label] else 1.0 for label in found}
        return msgspec.structs.replace(config, labels=found, class_weights=weights)

    def logits(self, bundle: Bundle) -> Tensor:
        return self.head(bundle)


def _weights(config: Classification.Config) -> tuple[float, ...]:
    """The weight of each class, () where all weigh the same."""
    weights = config.class_weights
    if isinstance(weights, str):
        raise UsageError(
            'class_weights = "balanced" is computed from training targets, and there are none',
            "train the model, or give a weight for each label",
        )
    if not weights:
        return ()
    for label in weights:
        if label not in config.labels:
            hint = did_you_mean(label, config.labels) or f"labels: {', '.join(config.labels[:10])}"
            raise UsageError(f"class_weights names the label {label!r}, which does not occur", hint)
    return tuple(weights.get(label, 1.0) for label in config.labels)
