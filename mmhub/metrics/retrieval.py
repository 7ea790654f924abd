"""Metrics of search: how far down the list the right thing stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def retrieval(predictions: Sequence[Mapping[str, Any]], references: Sequence[Any]) -> dict[str, Any]:
    raise NotImplementedError
