"""The contracts plugins implement: Processor, Encoder, Fusion, Decoder and Task, and the policy for raw inputs.

Names load on first use: what a recipe or a configuration may hold is checked without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmhub.interfaces.classifier import Classifier
    from mmhub.interfaces.config import ComponentConfig, Rate, Width, decode_config, encode_config
    from mmhub.interfaces.foreign import ForeignParts, ForeignReader, ForeignWriter
    from mmhub.interfaces.raw import Policy, describe_raw, raw_bytes
    from mmhub.interfaces.roles import Decoder, Encoder, Fusion, Processor, Stream
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
    "Policy",
    "Processor",
    "Rate",
    "Stream",
    "Task",
    "Width",
    "decode_config",
    "describe_raw",
    "encode_config",
    "find_task",
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
    "Policy": "raw",
    "Processor": "roles",
    "Rate": "config",
    "Stream": "roles",
    "TASKS": "task",
    "Task": "task",
    "Width": "config",
    "decode_config": "config",
    "describe_raw": "raw",
    "encode_config": "config",
    "find_task": "task",
    "raw_bytes": "raw",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"mmhub.interfaces.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
