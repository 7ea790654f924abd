"""A sample whose addresses are fetched once: what the model reads several times, and what is shown, is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmhub.conversation import read_messages
from mmhub.interfaces import Policy
from mmhub.interfaces.raw import is_url, raw_bytes
from mmhub.model import Model

_MEDIA = ("image", "audio")


def fetched(model: Model, sample: Mapping[str, Any], policy: Policy) -> Mapping[str, Any]:
    """Return the sample with {"bytes", "path"} in place of addresses of pictures and sounds, also in a conversation.

    Raises:
        InputError: an address cannot be fetched, or the policy does not permit it.
    """
    found = {name: _read(value, policy) for name, value in sample.items() if name in _MEDIA}
    if model.converses and sample.get("messages") is not None:
        talk = read_messages(sample["messages"], model.modalities)
        parts = [part for message in talk for part in message["content"] if part["type"] in _MEDIA]
        read = [(part, _read(part[part["type"]], policy)) for part in parts]
        if any(value is not part[part["type"]] for part, value in read):
            for part, value in read:
                part[part["type"]] = value
            found["messages"] = talk
    changed = any(value is not sample[name] for name, value in found.items())
    return {**sample, **found} if changed else sample


def _read(value: Any, policy: Policy) -> Any:
    if isinstance(value, list) and any(map(is_url, value)):
        return [_read(one, policy) for one in value]
    return {"bytes": raw_bytes(value, policy), "path": value} if is_url(value) else value
