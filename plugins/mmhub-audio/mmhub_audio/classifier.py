"""The classification head that transformers puts on wav2vec 2.0, HuBERT and WavLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec
from torch import Tensor, nn

from mmhub.batch import Bundle
from mmhub.errors import UsageError
from mmhub.interfaces import Classifier, ComponentConfig, Stream
from mmhub.interfaces.labels import check_labels
from mmhub.layers import masked_mean


class AudioClassifier(Classifier):
    """One label a clip: a projection of each token, their mean, and a linear layer."""

    needs: ClassVar[tuple[str, ...]] = ("audio",)

    class Config(ComponentConfig, frozen=True):
        """`labels` in the order of the classes; `size` is the width of the projection."""

        labels: tuple[str, ...]
        size: Annotated[int, msgspec.Meta(ge=1)] = 256

        def __post_init__(self) -> None:
            check_labels(self.labels)

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        if "audio" not in inputs:
            raise UsageError("this classifier reads an audio encoder alone", 'use the fusion "streams"')
        self.projector = nn.Linear(inputs["audio"].dim, config.size)
        self.classifier = nn.Linear(config.size, len(config.labels))

    def logits(self, bundle: Bundle) -> Tensor:
        features = bundle["audio"]
        logits: Tensor = self.classifier(masked_mean(self.projector(features.tokens), features.mask))
        return logits.float()
