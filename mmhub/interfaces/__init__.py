"""The contracts plugins implement: Processor, Encoder, Fusion, Decoder and Task, and the policy for raw inputs.

Names load on first use: what a recipe or a configuration may hold is checked without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmhub.lazy import lazy

if TYPE_CHECKING:
    from mmhub.interfaces.classifier import Classifier
    from mmhub.interfaces.config import ComponentConfig, Rate, Width, decode_config, encode_config
    from mmhub.interfaces.foreign import ForeignParts, ForeignReader, ForeignWriter
    from mmhub.interfaces.language import (
        Generation,
        LanguageModel,
        LanguageProcessor,
        Script,
        TextDecoder,
        Watermark,
        own_stream,
    )
    from mmhub.interfaces.pairs import PairDecoder
    from mmhub.interfaces.raw import Policy, describe_raw, raw_bytes
    from mmhub.interfaces.roles import Decoder, Encoder, Fusion, Processor, Stream, Window
    from mmhub.interfaces.task import TASKS, Task, find_task

__all__ = [
    "TASKS",
    "Classifier",
    "ComponentConfig",
    "Decoder",
    "Encoder",
    "ForeignParts",
    "ForeignReader",
    "ForeignWriter",
    "Fusion",
    "Generation",
    "LanguageModel",
    "LanguageProcessor",
    "PairDecoder",
    "Policy",
    "Processor",
    "Rate",
    "Script",
    "Stream",
    "Task",
    "TextDecoder",
    "Watermark",
    "Width",
    "Window",
    "decode_config",
    "describe_raw",
    "encode_config",
    "find_task",
    "own_stream",
    "raw_bytes",
]

_HOMES = {
    "Classifier": "classifier",
    "ComponentConfig": "config",
    "Decoder": "roles",
    "Encoder": "roles",
    "ForeignParts": "foreign",
    "ForeignReader": "foreign",
    "ForeignWriter": "foreign",
    "Fusion": "roles",
    "Generation": "language",
    "LanguageModel": "language",
    "LanguageProcessor": "language",
    "PairDecoder": "pairs",
    "Policy": "raw",
    "Processor": "roles",
    "Rate": "config",
    "Script": "language",
    "Stream": "roles",
    "TASKS": "task",
    "Task": "task",
    "TextDecoder": "language",
    "Watermark": "language",
    "Width": "config",
    "Window": "roles",
    "decode_config": "config",
    "describe_raw": "raw",
    "encode_config": "config",
    "find_task": "task",
    "own_stream": "language",
    "raw_bytes": "raw",
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
