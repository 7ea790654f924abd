"""What a language model reads: one stream of tokens, in the order in which they were written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmhub.batch import Bundle
from mmhub.errors import UsageError
from mmhub.interfaces import ComponentConfig, Fusion, Stream


class Interleave(Fusion):
    """Pass the text of a language model on as the stream `fused`, unchanged. Text alone, so far."""

    class Config(ComponentConfig):
        """Nothing to configure."""

    reads = "nothing"

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        others = sorted(set(inputs) - {"text"})
        if others or not inputs:
            given = f"{', '.join(others)} as well" if others else "nothing"
            raise UsageError(
                f'the fusion "interleave" reads text alone, and gets {given}',
                "leave the other modalities out, or take another fusion, such as concat",
            )
        self.outputs = {"fused": inputs["text"]}

    def forward(self, bundle: Bundle, plan: Any = None, embed: Any = None) -> Bundle:
        return {"fused": bundle["text"]}
