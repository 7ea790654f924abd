"""A folder that is a Hugging Face Space with this app for one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmhub.errors import UsageError


def export_space(names: Sequence[str], folder: Path) -> None:
    """Write the Space.

    Raises:
        UsageError: no model is named, or the folder is not empty.
    """
    if not names:
        raise UsageError("a Space is for a model", "mmhub ui NAME --export-space DIR")
