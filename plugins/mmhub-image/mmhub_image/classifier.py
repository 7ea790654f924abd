"""timm's classifier: one linear layer on the pooled vector of its own backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec
from torch import Tensor, nn

from mmhub.batch import Bundle
from mmhub.errors import UsageError
from mmhub.interfaces import Classifier, ComponentConfig, Stream
from mmhub.interfaces.labels import check_labels
from mmhub.layers import summary


class TimmClassifier(Classifier):
    """One label a picture, by the layer that timm's models end with."""

    needs: ClassVar[tuple[str, ...]] = ("image",)

    class Config(ComponentConfig, frozen=True):
        """`labels` in the order of the classes; `dropout` before the layer, in training."""

        labels: tuple[str, ...]
        bias: bool = True
        dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0

        def __post_init__(self) -> None:
            check_labels(self.labels)

    reads = "summary"

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        if "image" not in inputs:
            raise UsageError("timm's classifier reads an image encoder alone", 'use the fusion "streams"')
        self.dropout = nn.Dropout(config.dropout)
        self.layer = nn.Linear(inputs["image"].summary, len(config.labels), bias=config.bias)

    def logits(self, bundle: Bundle) -> Tensor:
        logits: Tensor = self.layer(self.dropout(summary(bundle["image"])))
        return logits.float()
