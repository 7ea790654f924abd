"""The contracts plugins implement: Processor, Encoder, Fusion, Decoder and Task, and the policy for raw inputs."""

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
