"""What both encoders share: the settings of the processor, and how it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmhub.errors import UsageError
from mmhub.interfaces import ComponentConfig, Encoder
from mmhub_timeseries.processor import Channels, Count, SeriesProcessor, Standardize


class SeriesConfig(ComponentConfig, frozen=True):
    """`channels` 0: as many as the training data have. `standardize`: by the training data, each series alone, or not.

    `max_length` bounds the steps of a series.
    """

    channels: Channels = 0
    standardize: Standardize = "training"
    max_length: Count = 100_000  # steps


class SeriesEncoder(Encoder):
    """An encoder of (N, S, 2C) values and missing-value indicators; padding never changes a real output."""

    modality = "timeseries"
    padding_invariant = True

    def __init__(self, config: Any, processor: SeriesProcessor) -> None:
        super().__init__(config, processor)
        if not processor.channels:
            raise UsageError("the number of channels is not known", "set channels in the config, or give training data")

    @classmethod
    def make_processor(cls, config: Any, tokenizer: Mapping[str, Any] | None = None) -> SeriesProcessor:
        settings = {key: getattr(config, key) for key in ("channels", "standardize", "max_length")}
        return SeriesProcessor(SeriesProcessor.Config(**settings))

    @classmethod
    def load_processor(cls, config: Any, state: Mapping[str, Any], files: Mapping[str, bytes]) -> SeriesProcessor:
        return SeriesProcessor.from_state(state, files)

    @classmethod
    def examples(cls) -> Sequence[Any]:
        """Series of one channel. None is a list, for a list of lists would be one series and not several."""
        return (
            np.sin(np.arange(24) / 3),
            "[0.5, 1.5, null, 0.25, -1.0]",
            "[[2.0], [1.0], [null], [0.0], [0.5], [1.0], [2.0], [3.0], [2.5]]",
            np.array([3.0]),
        )
