"""No mixing: every stream goes to the decoder as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmhub.batch import Bundle
from mmhub.interfaces import ComponentConfig, Fusion, Stream


class Streams(Fusion):
    """Pass the streams through, for one modality or for decoders that read several streams apart."""

    class Config(ComponentConfig):
        """Nothing to configure."""

    reads = "nothing"

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        self.outputs = dict(inputs)

    def forward(self, bundle: Bundle, plan: Any = None, embed: Any = None) -> Bundle:
        return bundle
