"""Metrics of captions and of answers to questions about pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def captions(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, Any]:
    raise NotImplementedError


def visual_answers(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, Any]:
    raise NotImplementedError
