"""Writing texts: token by token from any `TextDecoder`, for samples of a model, and in a conversation.

`write` works on tensors, `generate` on the samples of a model, `chat` and `Conversation` on messages. `detect`
finds the mark in texts that were written with one.
"""

from __future__ import annotations

from mmhub.generate.conversation import Conversation, chat
from mmhub.generate.samples import generate
from mmhub.generate.watermark import Detection, detect
from mmhub.generate.write import Written, write

__all__ = ["Conversation", "Detection", "Written", "chat", "detect", "generate", "write"]
