"""Metrics of transcripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def speech(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, Any]:
    raise NotImplementedError
