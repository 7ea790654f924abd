"""Raw inputs of a model as the cells of a table hold them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmhub.conversation import Message, media_of, of_json, read_messages
from mmhub.errors import InputError


def usable(modality: str, value: Any, folder: Path | None = None, alone: bool = True) -> Any:
    """Return a cell's raw input, None where the cell is empty. A relative path is looked for beside the table first.

    The empty text is a text where text is the only input (`alone`), and a missing one beside others. A list of raw
    inputs loses those that are missing; a list that holds numbers is data, and its gaps are part of it. A conversation
    is itself for text, and its inputs of that modality for any other, which may be written as JSON, too.
    """
    if modality != "text" and is_conversation(talk := of_json(value)):
        value = talk
    if is_conversation(value):
        return _of_talk(value, modality, folder)
    if modality == "text" and isinstance(value, Mapping):  # a pair of texts
        return value
    if isinstance(value, Mapping) and value.get("bytes") is None and "array" not in value:
        return usable(modality, value.get("path"), folder, alone)
    if isinstance(value, (list, tuple)) and not _holds_number(value):
        return [part for item in value if (part := usable(modality, item, folder, alone)) is not None] or None
    if isinstance(value, float) and math.isnan(value):  # pandas' missing value
        return None
    if not isinstance(value, str):
        return value
    if modality == "text":
        return value if value or alone else None
    if value and folder is not None and os.path.exists(folder / value):  # Path.exists raises for a very long text
        return folder / value
    return value or None


def is_conversation(value: Any) -> bool:
    """Is a cell a list of messages?"""
    if str(getattr(value, "dtype", "")) == "object":  # numpy's, as tables may have it
        value = value.tolist()
    listed = isinstance(value, (list, tuple)) and len(value) > 0
    return listed and isinstance(value[0], Mapping) and "role" in value[0]


class Anything(dict[str, Any]):
    """Stands for the processors of a model that is not known: every modality is one of its."""

    def __contains__(self, name: object) -> bool:
        return True


def placed_messages(value: Any, modalities: Any, folder: Path | None) -> list[Message]:
    """Return a cell's conversation as `read_messages` does, with paths looked for beside the table first.

    Raises:
        InputError: as `read_messages`.
    """
    messages = read_messages(value, modalities)
    for message in messages:
        parts = []
        for part in message["content"]:
            kind = part["type"]
            raw = part["text"] if kind == "text" else usable(kind, part[kind], folder)
            parts += [{"type": kind, kind: raw}] if raw is not None else []
        message["content"] = parts
    return messages


def _of_talk(value: Any, modality: str, folder: Path | None) -> Any:
    """What `usable` returns of a conversation; whoever reads it as one says what is wrong with it."""
    try:
        messages = placed_messages(value, Anything(), folder)
    except InputError:
        return value if modality == "text" else None
    return messages if modality == "text" else media_of(messages, modality) or None


def _holds_number(value: Any) -> bool:
    """Is there a number, and no mere NaN, in a list or a list inside it?"""
    if isinstance(value, (list, tuple)):
        return any(map(_holds_number, value))
    return isinstance(value, (int, float)) and value == value
