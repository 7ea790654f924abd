"""Raw inputs as requests hold them: texts, and media in base64."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from mmhub.errors import InputError


def read_sample(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample whose media, {"base64": text}, are bytes; a list holds several.

    Raises:
        InputError: what stands there as base64 is none.
    """
    return {name: _read(name, value) for name, value in given.items() if value is not None}


def _read(name: str, value: Any) -> Any:
    if isinstance(value, list) and name != "messages":
        return [_read(name, part) for part in value]
    if isinstance(value, Mapping) and "base64" in value:
        try:
            return base64.b64decode(value["base64"], validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise InputError(f"{name}: the value of 'base64' is no base64", "encode the file's bytes") from None
    return value
